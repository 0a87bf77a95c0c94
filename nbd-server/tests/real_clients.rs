//! Other people's clients against the server. A client that is not installed is printed as skipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blkrepl_nbd::ExportRefusal;
use common::{Manner, Memory, TestServer, Volume, pattern};

const SIZE: usize = 32 << 20;

/// Runs a program; `None` (and a line that says so) if it is not installed.
fn run(program: &str, args: &[&str]) -> Option<Output> {
    // nbdsh takes the first python3 of PATH, and its module belongs to that of the system.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    match Command::new(program).env("PATH", path).args(args).output() {
        Ok(output) => Some(output),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            println!("SKIPPED: {program} is not installed");
            None
        }
        Err(e) => panic!("{program}: {e}"),
    }
}

fn run_ok(program: &str, args: &[&str]) -> Option<String> {
    let output = run(program, args)?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {text}");
    Some(text)
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a temporary directory has a name in UTF-8")
}

#[test]
fn nbdinfo_sees_the_export_and_the_refusal() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let text = "volume away: n2 is primary, at nbd://10.0.0.2:10809/away";
    let refusals = [("away".to_owned(), ExportRefusal::Policy(text.into()))].into();
    let server =
        TestServer::start(Arc::new(Memory { volumes: [("vol0".to_owned(), volume)].into(), refusals }));
    let Some(info) = run_ok("nbdinfo", &[&server.unix("vol0").to_string()]) else { return };
    for expected in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export-size: 33554432",
        "is_read_only: false",
        "can_flush: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_multi_conn: true",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
        "uri: nbd+unix:///vol0?socket=",
    ] {
        assert!(info.contains(expected), "{expected} in\n{info}");
    }
    assert!(run_ok("nbdinfo", &[&server.tcp("vol0").to_string()]).is_some());
    let away = server.unix("away").to_string();
    // libnbd tells the server's words only in its debug output.
    let refused = run("env", &["LIBNBD_DEBUG=1", "nbdinfo", &away]).unwrap();
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains(text), "{said}");
}

#[test]
fn qemu_tells_its_user_who_is_primary() {
    let text = "volume away: n2 is primary, at nbd://10.0.0.2:10809/away";
    let refusals = [("away".to_owned(), ExportRefusal::Policy(text.into()))].into();
    let server = TestServer::start(Arc::new(Memory { refusals, ..Memory::default() }));
    let Some(refused) = run("qemu-img", &["info", &server.unix("away").to_string()]) else { return };
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains(text), "{said}");
}

#[test]
fn nbdinfo_lists_the_exports() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::of([("vol0", &volume), ("vol1", &volume)]));
    let Some(list) = run_ok("nbdinfo", &["--list", &server.unix("").to_string()]) else { return };
    assert!(list.contains("export=\"vol0\"") && list.contains("export=\"vol1\""), "{list}");
}

#[test]
fn nbdcopy_brings_a_file_in_and_out() {
    let volume = Volume::new(SIZE, Manner::Reversed(1));
    let server = TestServer::start(Memory::one(&volume));
    let mut content = pattern(11, SIZE);
    content[4 << 20..12 << 20].fill(0);
    let (source, back) = (server.dir.path().join("in"), server.dir.path().join("out"));
    std::fs::write(&source, &content).unwrap();
    let uri = server.unix("vol0").to_string();
    if run_ok("nbdcopy", &["--flush", path(&source), &uri]).is_none() {
        return;
    }
    assert!(*volume.data.lock().unwrap() == content);
    run_ok("nbdcopy", &[&server.tcp("vol0").to_string(), path(&back)]);
    assert!(std::fs::read(&back).unwrap() == content);
}

#[test]
fn qemu_img_converts_and_compares() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let mut content = pattern(12, SIZE);
    content[1 << 20..9 << 20].fill(0);
    let source = server.dir.path().join("in");
    std::fs::write(&source, &content).unwrap();
    let uri = server.unix("vol0").to_string();
    if run_ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", path(&source), &uri]).is_none() {
        return;
    }
    assert!(*volume.data.lock().unwrap() == content);
    let same = run_ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", path(&source), &uri]).unwrap();
    assert!(same.contains("identical"), "{same}");
}

#[test]
fn qemu_io_patterns_hold() {
    let server = TestServer::start(Memory::one(&Volume::new(SIZE, Manner::InOrder)));
    let uri = server.unix("vol0").to_string();
    let commands = [
        "write -P 0xa5 0 1M",
        "write -P 0x5a 513 4097",
        "read -P 0x5a 513 4097",
        "read -P 0xa5 8192 4096",
        "write -z 65536 65536",
        "read -P 0 65536 65536",
        "write -f -P 0x11 1M 64k",
        "discard 1M 64k",
        "read -P 0 1M 64k",
        "flush",
    ];
    let mut args = vec!["-f", "raw", "-t", "none", "-d", "unmap"];
    for command in &commands {
        args.extend(["-c", command]);
    }
    args.push(&uri);
    let Some(text) = run_ok("qemu-io", &args) else { return };
    assert!(!text.contains("verification failed") && !text.contains("error"), "{text}");
}

/// A server with a volume that has holes, all but 4 MiB to 12 MiB.
fn with_holes(seed: u64) -> (TestServer, Arc<Volume>) {
    let volume = Volume::new(SIZE, Manner::InOrder);
    volume.data.lock().unwrap()[4 << 20..12 << 20].copy_from_slice(&pattern(seed, 8 << 20));
    (TestServer::start(Memory::one(&volume)), volume)
}

/// The numbers that follow `"name":` in a JSON text, one after the other.
fn numbers(json: &str, name: &str) -> Vec<u64> {
    let json: String = json.split_whitespace().collect();
    let key = format!("\"{name}\":");
    let after = json.split(&key).skip(1);
    after.map(|rest| rest.split([',', '}', ']']).next().unwrap().parse().unwrap()).collect()
}

/// Starts, lengths and states as a map of `base:allocation` has them.
const HOLES: [(u64, u64, u64); 3] =
    [(0, 4 << 20, 3), (4 << 20, 8 << 20, 0), (12 << 20, (SIZE as u64) - (12 << 20), 3)];

#[test]
fn nbdinfo_maps_holes() {
    let (server, _) = with_holes(13);
    let uri = server.unix("vol0").to_string();
    let Some(map) = run_ok("nbdinfo", &["--map", "--json", &uri]) else { return };
    let found: Vec<_> = std::iter::zip(numbers(&map, "offset"), numbers(&map, "length")).collect();
    let found: Vec<_> = std::iter::zip(found, numbers(&map, "type")).map(|((o, l), t)| (o, l, t)).collect();
    assert_eq!(found, HOLES, "{map}");
    let text = run_ok("nbdinfo", &["--map", &uri]).unwrap();
    assert!(text.contains("hole,zero"), "{text}");
}

#[test]
fn nbdinfo_maps_what_is_dirty() {
    let (server, _) = with_holes(14);
    let uri = server.tcp("vol0").to_string();
    let Some(map) = run_ok("nbdinfo", &["--map=blkrepl:dirty", "--json", &uri]) else { return };
    let mib: Vec<u64> = (0..32).collect();
    assert_eq!(numbers(&map, "offset"), mib.iter().map(|n| n << 20).collect::<Vec<_>>(), "{map}");
    assert_eq!(numbers(&map, "type"), mib.iter().map(|n| n % 2).collect::<Vec<_>>(), "{map}");
}

#[test]
fn nbdinfo_names_the_contexts() {
    let (server, _) = with_holes(15);
    let Some(info) = run_ok("nbdinfo", &["--json", &server.unix("vol0").to_string()]) else { return };
    for expected in ["\"base:allocation\"", "\"blkrepl:dirty\"", "\"can_df\": true", "\"structured\": true"] {
        assert!(info.contains(expected), "{expected} in\n{info}");
    }
}

#[test]
fn nbdcopy_reads_no_holes() {
    let (server, volume) = with_holes(16);
    let back = server.dir.path().join("out");
    if run_ok("nbdcopy", &[&server.unix("vol0").to_string(), path(&back)]).is_none() {
        return;
    }
    assert!(std::fs::read(&back).unwrap() == *volume.data.lock().unwrap());
    assert_eq!(volume.read.load(Ordering::Relaxed), 8 << 20, "only what is no hole was read");
}

#[test]
fn qemu_img_maps_and_converts_holes() {
    let (server, volume) = with_holes(17);
    let uri = server.unix("vol0").to_string();
    let Some(map) = run_ok("qemu-img", &["map", "-f", "raw", "--output=json", &uri]) else { return };
    assert_eq!(numbers(&map, "start"), HOLES.map(|(start, _, _)| start), "{map}");
    let flat: String = map.split_whitespace().collect();
    assert_eq!(flat.matches("\"zero\":true,\"data\":false").count(), 2, "{map}");
    assert_eq!(flat.matches("\"zero\":false,\"data\":true").count(), 1, "{map}");
    let back = server.dir.path().join("out");
    run_ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, path(&back)]);
    assert!(std::fs::read(&back).unwrap() == *volume.data.lock().unwrap());
    assert_eq!(volume.read.load(Ordering::Relaxed), 8 << 20, "only what is no hole was read");
}

#[test]
fn qemu_img_maps_what_is_dirty() {
    let (server, _) = with_holes(18);
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=vol0,x-dirty-bitmap=blkrepl:dirty",
        path(&server.socket())
    );
    let Some(map) = run_ok("qemu-img", &["map", "--output=json", "--image-opts", &image]) else { return };
    // With such an option qemu says of what is dirty that it is no data.
    assert_eq!(numbers(&map, "start").len(), 32, "{map}");
    assert_eq!(map.matches("\"data\": false").count(), 16, "{map}");
}

#[test]
fn nbdsh_asks_for_one_extent_and_lists_contexts() {
    let (server, _) = with_holes(19);
    let script = "
h.add_meta_context('base:allocation')
h.add_meta_context('blkrepl:dirty')
h.set_opt_mode(True)
h.connect_uri(URI)
listed = []
h.set_export_name('vol0')
h.clear_meta_contexts()
h.opt_list_meta_context(listed.append)
assert listed == ['base:allocation', 'blkrepl:dirty'], listed
h.add_meta_context('base:allocation')
h.add_meta_context('blkrepl:dirty')
h.opt_go()
said = {}
def note(context, offset, entries, error):
    said[context] = entries
h.block_status(16 << 20, 0, note, nbd.CMD_FLAG_REQ_ONE)
assert said == {'base:allocation': [4 << 20, 3], 'blkrepl:dirty': [1 << 20, 0]}, said
said.clear()
h.block_status(2 << 20, 3 << 20, note)
assert said['base:allocation'] == [1 << 20, 3, 1 << 20, 0], said
h.shutdown()
";
    let script = script.replace("URI", &format!("'{}'", server.unix("vol0")));
    if run("nbdsh", &["--version"]).is_none() {
        return;
    }
    // It takes the first python3 of PATH, and its module belongs to that of the system.
    let path = format!("PATH=/usr/bin:{}", std::env::var("PATH").unwrap());
    run_ok("env", &[&path, "nbdsh", "-c", &script]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    let server = TestServer::start(Memory::one(&Volume::new(SIZE, Manner::InOrder)));
    let uri = format!("--uri={}", server.unix("vol0"));
    let args = [
        "--name=job",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-65536",
        "--iodepth=32",
        "--size=16m",
        "--verify=crc32c",
        "--do_verify=1",
        "--fsync=64",
        "--verify_state_save=0",
    ];
    let Some(output) = run("fio", &args) else { return };
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if text.contains("engine nbd not loadable") {
        println!("SKIPPED: fio has no nbd engine here");
        return;
    }
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("verify: bad"), "{text}");
}
