//! `blkrepl serve` with sockets that a service manager made: they are used, their files stay, and one that is
//! nobody's is refused by its address.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use blkrepl_nbd::{ClientOptions, Target, list_exports};
use blkrepl_tests::binary::blkrepl;
use blkrepl_tests::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_secs(30);

/// Makes the standard input the first passed descriptor, names this process, and becomes the program.
const AS_A_MANAGER: &str = r#"exec 3<&0 </dev/null; LISTEN_PID=$$; export LISTEN_PID; exec "$0" "$@""#;

/// A cluster of one node, which has a store but has never run.
fn node(dir: &Path) -> PathBuf {
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let listen = format!("control = \"{}\"\npeer = \"{}\"\n", free(), free());
    let config = dir.join("node.toml");
    let me = "id = 1\nname = \"n1\"\nkind = \"data\"\n";
    fs::write(&config, format!("[node]\n{me}[listen]\n{listen}[[cluster]]\n{me}{listen}")).unwrap();
    let init = Command::new(blkrepl().unwrap()).arg("init").arg("--config").arg(&config).output().unwrap();
    assert!(init.status.success(), "{init:?}");
    config
}

fn serve(config: &Path, socket: OwnedFd, name: &str) -> Child {
    Command::new("sh")
        .args(["-c", AS_A_MANAGER])
        .arg(blkrepl().unwrap())
        .arg("serve")
        .arg("--config")
        .arg(config)
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", name)
        .stdin(Stdio::from(socket))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn end(child: Child) -> Output {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_passed_socket_serves_nbd_and_its_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let config = node(dir.path());
    let path = dir.path().join("from-the-manager.sock");
    let socket = UnixListener::bind(&path).unwrap();
    let child = serve(&config, socket.try_clone().unwrap().into(), "nbd");
    let target = Target::Unix(path.clone());
    let options = ClientOptions { connect_timeout: LIMIT, io_timeout: LIMIT };
    // The socket is there from the start: a client that comes too early waits.
    let listed = list_exports(&target, options);
    let bound = dir.path().join("nbd.sock").exists();
    wait_until("the admin socket", LIMIT, || dir.path().join("admin.sock").exists()).unwrap();
    let inherited = fs::read(format!("/proc/{}/fdinfo/3", child.id()));
    let output = end(child);
    assert_eq!(listed.unwrap(), Vec::<String>::new(), "{output:?}");
    assert!(!bound, "what was passed takes the place of the config's unix socket");
    let flags = String::from_utf8(inherited.unwrap()).unwrap();
    let flags = flags.lines().find_map(|line| line.strip_prefix("flags:\t")).unwrap().to_owned();
    assert_ne!(i32::from_str_radix(&flags, 8).unwrap() & libc::O_CLOEXEC, 0, "not for children: {flags}");
    assert!(output.status.success(), "{output:?}");
    assert!(path.exists(), "it is its maker's");
}

#[test]
fn a_passed_socket_that_is_nobodys_is_refused_by_its_address() {
    let dir = tempfile::tempdir().unwrap();
    let config = node(dir.path());
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = socket.local_addr().unwrap().to_string();
    let output = serve(&config, socket.into(), "web").wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in [addr.as_str(), "web", "FileDescriptorName=nbd"] {
        assert!(said.contains(word), "{said}");
    }
}
