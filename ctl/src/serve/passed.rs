//! Listening sockets that a service manager passes (systemd's socket activation), and which of them are for NBD.
//!
//! A socket is NBD's if it is named `nbd` (`FileDescriptorName=nbd`) or listens on an address that node.toml gives
//! for NBD. It takes the place of what would be bound: if a TCP socket was passed, no TCP address of the config is
//! bound, and the same for unix sockets. A socket that is nobody's is an error, since its clients would wait for
//! ever. The file of a unix socket that was passed is its maker's and stays.
//!
//! Pure but for a look at the sockets' addresses: taking them from the environment is the binary's.

use std::os::fd::OwnedFd;

use anyhow::{Context, bail};
use blkrepl_nbd::ListenAddr;

/// Number of the first descriptor that is passed.
pub const FIRST: i32 = 3;
/// Most descriptors that are taken.
pub const MAX: i32 = 64;
/// Name of a socket that is for NBD, wherever it listens.
const NBD: &str = "nbd";

/// A socket that was passed.
#[derive(Debug)]
pub struct Passed {
    /// Its name; empty if it has none.
    pub name: String,
    /// The socket.
    pub socket: OwnedFd,
}

/// How many descriptors the environment says were passed to the process `me`, with their names. Nothing was, if
/// the variables are missing or meant for another process.
///
/// # Errors
/// The variables contradict themselves.
pub fn announced(
    me: u32,
    pid: Option<&str>,
    count: Option<&str>,
    names: Option<&str>,
) -> Result<Vec<String>, String> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(Vec::new()) };
    let wrong = |what: &str, found: &str| {
        format!(
            "{what} is '{found}', which is no number; the service manager that started this process set it"
        )
    };
    if pid.parse::<u32>().map_err(|_| wrong("LISTEN_PID", pid))? != me {
        return Ok(Vec::new());
    }
    let count = count.parse::<usize>().map_err(|_| wrong("LISTEN_FDS", count))?;
    if count > MAX as usize {
        return Err(format!("LISTEN_FDS says that {count} sockets were passed; at most {MAX} are taken"));
    }
    let mut names: Vec<String> = match names {
        Some(names) if !names.is_empty() => names.split(':').map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    if names.len() > count {
        let surplus = names.len();
        return Err(format!("LISTEN_FDNAMES has {surplus} names for the {count} sockets of LISTEN_FDS"));
    }
    names.resize(count, String::new());
    Ok(names)
}

/// The sockets for NBD, and which of the configured addresses are still to be bound.
///
/// # Errors
/// A descriptor is no listening socket, or nobody's.
pub fn for_nbd(
    passed: Vec<Passed>,
    configured: Vec<ListenAddr>,
) -> anyhow::Result<(Vec<OwnedFd>, Vec<ListenAddr>)> {
    let mut found = Vec::with_capacity(passed.len());
    let mut sockets = Vec::with_capacity(passed.len());
    for (number, Passed { name, socket }) in (FIRST..).zip(passed) {
        let addr = ListenAddr::of_socket(&socket)
            .with_context(|| format!("descriptor {number} ('{name}'), passed by the service manager"))?;
        if name != NBD && !configured.contains(&addr) {
            let known: Vec<String> = configured.iter().map(ToString::to_string).collect();
            bail!(
                "the socket {addr} ('{name}'), passed by the service manager, is for nobody: NBD listens on {}; \
                 let the socket unit say FileDescriptorName={NBD}, or change its address or that in [listen]",
                known.join(" and ")
            );
        }
        found.push(addr);
        sockets.push(socket);
    }
    let is_tcp = |addr: &ListenAddr| matches!(addr, ListenAddr::Tcp(_));
    let was_passed = |addr: &ListenAddr| found.iter().any(|other| is_tcp(other) == is_tcp(addr));
    let to_bind = configured.into_iter().filter(|addr| !was_passed(addr)).collect();
    Ok((sockets, to_bind))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn what_is_announced_is_for_one_process_and_has_as_many_names() {
        let of = |pid, count, names| announced(7, pid, count, names);
        assert_eq!(of(None, Some("2"), None), Ok(vec![]));
        assert_eq!(of(Some("8"), Some("2"), None), Ok(vec![]), "meant for another process");
        assert_eq!(of(Some("7"), Some("2"), Some("nbd")), Ok(vec!["nbd".into(), String::new()]));
        assert_eq!(of(Some("7"), Some("2"), Some("a:nbd")), Ok(vec!["a".into(), "nbd".into()]));
        assert_eq!(of(Some("7"), Some("1"), Some("")), Ok(vec![String::new()]));
        for (pid, count, names) in [("x", "1", ""), ("7", "-1", ""), ("7", "65", ""), ("7", "1", "a:b")] {
            assert!(of(Some(pid), Some(count), Some(names)).is_err(), "{pid} {count} {names}");
        }
    }

    fn passed(name: &str, socket: impl Into<OwnedFd>) -> Passed {
        Passed { name: name.into(), socket: socket.into() }
    }

    #[test]
    fn a_passed_socket_takes_the_place_of_the_address_of_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let unix = || UnixListener::bind(&path).unwrap();
        let tcp = || TcpListener::bind("127.0.0.1:0").unwrap();
        let configured =
            || vec![ListenAddr::Unix(path.clone()), ListenAddr::Tcp("10.0.0.1:10809".parse().unwrap())];
        assert_eq!(for_nbd(Vec::new(), configured()).unwrap().1, configured());
        let (sockets, to_bind) = for_nbd(vec![passed("blkrepl.socket", unix())], configured()).unwrap();
        assert_eq!((sockets.len(), to_bind), (1, configured()[1..].to_vec()));
        let (sockets, to_bind) = for_nbd(vec![passed("nbd", tcp())], configured()).unwrap();
        assert_eq!((sockets.len(), to_bind), (1, configured()[..1].to_vec()));
    }

    #[test]
    fn what_is_no_listening_socket_or_nobodys_is_refused_by_name_and_address() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = tcp.local_addr().unwrap();
        let configured = vec![ListenAddr::Unix("/run/nbd.sock".into())];
        let error = format!("{:#}", for_nbd(vec![passed("web", tcp)], configured.clone()).unwrap_err());
        for word in [addr.to_string().as_str(), "web", "/run/nbd.sock", "FileDescriptorName=nbd"] {
            assert!(error.contains(word), "{error}");
        }
        let (stream, _other) = UnixStream::pair().unwrap();
        let error = format!("{:#}", for_nbd(vec![passed("nbd", stream)], configured).unwrap_err());
        assert!(error.contains("descriptor 3") && error.contains("listen"), "{error}");
    }
}
