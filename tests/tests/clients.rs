//! Real NBD clients against the primary: nbdinfo, nbdcopy, nbdsh, qemu-img, qemu-io, qemu-storage-daemon, fio. Each
//! must run clean, and what went in must come out. A node that is not primary refuses and says who is.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blkrepl_tests::binary::workspace;
use blkrepl_tests::client::{Link, LinkError};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::features::{features, first_column};
use blkrepl_tests::proc::{Finished, Proc, missing, run, run_ok};
use blkrepl_tests::report::{measured, skipped};
use blkrepl_tests::wait::wait_until;
use blkrepl_tests::{Cluster, ClusterOptions, files, with_cluster};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
const LIMIT: Duration = Duration::from_secs(120);

/// Runs `body` with the primary's two addresses, or says why not.
fn against_primary(name: &str, tools: &[&str], body: impl FnOnce(&mut Cluster, &[String; 2]) -> Result<()>) {
    if let Some(reason) = missing(tools) {
        skipped(name, &reason);
        return;
    }
    with_cluster(name, ClusterOptions::sized(SIZE), |cluster| {
        let primary = cluster.node(&cluster.wait_primary(SYNC_LIMIT)?)?;
        let addresses = [primary.unix()?.to_owned(), primary.tcp()?.to_owned()];
        body(cluster, &addresses)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

#[test]
fn nbdinfo_sees_the_volume_and_the_secondary_names_the_primary() {
    against_primary("nbdinfo", &["nbdinfo"], |cluster, addresses| {
        for address in addresses {
            let info = run_ok("nbdinfo", &["--json", address.as_str()], LIMIT)?.stdout;
            let info: serde_json::Value = serde_json::from_str(&info).context("parse nbdinfo's JSON")?;
            ensure!(info["structured"].as_bool() == Some(true), "structured replies in {info}");
            let export = &info["exports"][0];
            ensure!(export["export-size"].as_u64() == Some(SIZE), "size in {export}");
            for flag in
                ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_cache", "can_df"]
            {
                ensure!(export[flag].as_bool() == Some(true), "{flag} in {export}");
            }
            ensure!(export["is_read_only"].as_bool() == Some(false), "read-only in {export}");
            ensure!(export["block_size_maximum"].as_u64() == Some(32 * MIB), "block sizes in {export}");
            let list = run_ok("nbdinfo", &["--list", "--json", address.as_str()], LIMIT)?.stdout;
            ensure!(list.contains(cluster.volume()), "the list lacks the volume: {list}");
        }
        let primary = cluster.wait_primary(SYNC_LIMIT)?;
        let secondary = cluster.node(&cluster.secondary()?)?;
        match Link::connect(secondary.unix()?, LIMIT) {
            Err(LinkError::NotPrimary(text)) => {
                ensure!(text.contains(&primary), "the refusal does not name {primary}: {text}");
            }
            Err(other) => bail!("the secondary refuses in another way: {other}"),
            Ok(_) => bail!("the secondary serves clients"),
        }
        let refused = run(Command::new("nbdinfo").arg(secondary.tcp()?), LIMIT)?;
        ensure!(refused.code() != 0, "nbdinfo is served by the secondary: {}", refused.text());
        Ok(())
    });
}

#[test]
fn the_table_of_features_is_what_nbdinfo_says() {
    against_primary("features", &["nbdinfo"], |_, addresses| {
        let document = std::fs::read_to_string(workspace().join("docs/nbd.md"))?;
        let documented = first_column(&document);
        ensure!(documented.len() > 15, "only {} features in the table of docs/nbd.md", documented.len());
        for address in addresses {
            let found = features(address)?;
            for (name, said) in &documented {
                // Another nbdinfo may have words for more or less than the one that the table was made with.
                let Some(found) = found.get(name) else { continue };
                ensure!(found == said, "{name} is {found}, docs/nbd.md says {said}; make the table again");
            }
            let known = found.keys().filter(|name| documented.contains_key(*name)).count();
            ensure!(known > 15, "nbdinfo knows only {known} features of the table");
        }
        Ok(())
    });
}

#[test]
fn nbdcopy_brings_a_file_in_and_out() {
    against_primary("nbdcopy", &["nbdcopy"], |cluster, addresses| {
        let (source, back) = (cluster.dir().join("source"), cluster.dir().join("back"));
        for (seed, address) in addresses.iter().enumerate() {
            let len = 48 * MIB + 4096 * 3;
            files::make_random(&source, len, seed as u64)?;
            let (source_arg, back_arg) = (source.display().to_string(), back.display().to_string());
            let started = std::time::Instant::now();
            run_ok("nbdcopy", &["--flush", &source_arg, address], LIMIT)?;
            let rate = len as f64 / 1e6 / started.elapsed().as_secs_f64();
            measured("nbdcopy", &format!("in over {}: {rate:.0} MB/s", scheme(address)));
            run_ok("nbdcopy", &[address, &back_arg], LIMIT)?;
            files::compare(&source, &back, len)?;
        }
        Ok(())
    });
}

/// A file of the volume's size that is a hole but for some MiB of data.
fn make_sparse(path: &Path, seed: u64) -> Result<Vec<u64>> {
    files::make_random(path, MIB, seed)?;
    let piece = std::fs::read(path)?;
    File::create(path)?.set_len(SIZE)?;
    let file = OpenOptions::new().write(true).open(path)?;
    let places: Vec<u64> = vec![0, 1, 17, 40 + seed, 60, 95];
    places.iter().try_for_each(|place| file.write_all_at(&piece, place * MIB))?;
    Ok(places)
}

/// MiB of the volume that are no hole, by what its server says.
fn allocated(address: &str) -> Result<Vec<u64>> {
    let text = run_ok("nbdinfo", &["--map", "--json", address], LIMIT)?.stdout;
    let map: serde_json::Value = serde_json::from_str(&text).context("parse nbdinfo's JSON")?;
    let mut places = Vec::new();
    for entry in map.as_array().context("a list of extents")? {
        let number = |key: &str| entry[key].as_u64().with_context(|| format!("{key} in {entry}"));
        let (start, len) = (number("offset")?, number("length")?);
        ensure!(start % MIB == 0 && len % MIB == 0, "an extent that nobody made: {entry}");
        if number("type")? & 1 == 0 {
            places.extend(start / MIB..(start + len) / MIB);
        }
    }
    Ok(places)
}

#[test]
fn nbdcopy_keeps_holes_over_four_connections_both_ways() {
    let name = "nbdcopy_sparse";
    against_primary(name, &["nbdcopy", "nbdinfo"], |cluster, addresses| {
        let (source, back) = (cluster.dir().join("source"), cluster.dir().join("back"));
        let (source_arg, back_arg) = (source.display().to_string(), back.display().to_string());
        for (seed, address) in (0..).zip(addresses) {
            // Data where the holes of the source go, so that it has to be given up.
            let mut link = Link::connect(address, LIMIT)?;
            for at in (0..SIZE / MIB).step_by(3) {
                link.write(at * MIB, &vec![0xdd; MIB as usize])?;
            }
            drop(link);
            let places = make_sparse(&source, seed)?;
            let many = ["--connections=4", "--threads=4", "--requests=32", "--verbose", "--flush"];
            let done = run_ok("nbdcopy", &[&many[..], &[&source_arg, address]].concat(), LIMIT)?;
            ensure!(done.text().contains("connections=4 "), "not four connections");
            let found = allocated(address)?;
            ensure!(found == places, "data at {found:?} MiB, the source has it at {places:?}");
            let done = run_ok("nbdcopy", &[&many[..], &[address, &back_arg]].concat(), LIMIT)?;
            ensure!(done.text().contains("connections=4 "), "not four connections");
            files::compare(&source, &back, SIZE)?;
            let (data, taken) = (places.len() as u64 * MIB, std::fs::metadata(&back)?.blocks() * 512);
            ensure!(taken <= data + MIB, "{data} bytes of data take {taken} in the copy");
            std::fs::remove_file(&back)?;
        }
        for node in cluster.data_nodes()? {
            let taken = std::fs::metadata(node.data()?)?.blocks() * 512;
            ensure!(taken < 12 * MIB, "{} takes {taken} bytes for 6 MiB of data", node.name);
        }
        Ok(())
    });
}

/// What a script in nbdsh finds true, in `URI` and `SIZE`.
const SCRIPT: &str = r#"
h.add_meta_context("base:allocation")
h.add_meta_context("blkrepl:dirty")
h.connect_uri(URI)
assert h.get_size() == SIZE
assert h.can_multi_conn() and h.can_df() and h.can_cache() and h.can_zero() and h.can_trim()
assert not h.is_read_only()
assert h.can_meta_context("base:allocation") and h.can_meta_context("blkrepl:dirty")

h.trim(4 << 20, 0)
h.pwrite(b"a" * 65536, 1 << 20, nbd.CMD_FLAG_FUA)
said = {}
def note(context, offset, entries, error):
    said[context] = entries
h.block_status(4 << 20, 0, note)
assert said["base:allocation"] == [1 << 20, 3, 65536, 0, (3 << 20) - 65536, 3], said
assert said["blkrepl:dirty"] == [4 << 20, 0], said
h.block_status(4 << 20, 0, note, nbd.CMD_FLAG_REQ_ONE)
assert said["base:allocation"] == [1 << 20, 3], said
h.zero(32768, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
if h.can_fast_zero():
    h.zero(16384, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(65536, 1 << 20) == bytes(32768) + b"a" * 32768
assert h.pread_structured(65536, 1 << 20, lambda *a: None, nbd.CMD_FLAG_DF)[32768:] == b"a" * 32768
h.cache(4 << 20, 0)
h.flush()

# Many at once, answered in any order.
pieces = {n: bytes([n + 1]) * 8192 for n in range(64)}
cookies = {h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(p)), (8 << 20) + n * 8192) for n, p in pieces.items()}
while cookies:
    h.poll(-1)
    cookies -= {c for c in cookies if h.aio_command_completed(c)}
assert h.pread(64 * 8192, 8 << 20) == b"".join(pieces[n] for n in range(64))

# Without its own checks the library sends what it is told; the server refuses, and the session goes on.
h.set_strict_mode(0)
def refused(call, errno):
    try:
        call()
    except nbd.Error as reason:
        assert reason.errno == errno, reason
    else:
        raise AssertionError("not refused")
refused(lambda: h.pread(4096, SIZE), "EINVAL")
refused(lambda: h.pwrite(b"x" * 4096, SIZE - 1), "ENOSPC")
refused(lambda: h.trim(4096, SIZE), "EINVAL")
refused(lambda: h.zero(4096, SIZE), "ENOSPC")
fast_with_space = nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE
refused(lambda: h.zero(4096, 0, fast_with_space), "ENOTSUP" if h.can_fast_zero() else "EINVAL")
refused(lambda: h.pwrite(b"", 0), "EINVAL")
refused(lambda: h.flush(nbd.CMD_FLAG_DF), "EINVAL")
assert h.pread(4096, 8 << 20) == pieces[0][:4096]
h.shutdown()
"#;

/// nbdsh with a script. It takes the first python3 of PATH, and its module belongs to that of the system.
fn nbdsh(script: &str) -> Result<Finished> {
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    run(Command::new("nbdsh").env("PATH", path).args(["-c", script]), LIMIT)
}

#[test]
fn nbdsh_scripts_find_what_the_document_says() {
    let name = "nbdsh";
    if let Some(reason) = missing(&[name]) {
        return skipped(name, &reason);
    }
    if !nbdsh("pass").is_ok_and(|done| done.code() == 0) {
        return skipped(name, "python3 has no module nbd");
    }
    against_primary(name, &[name], |_, addresses| {
        for address in addresses {
            let script = SCRIPT.replace("URI", &format!("{address:?}")).replace("SIZE", &SIZE.to_string());
            nbdsh(&script)?.ok().with_context(|| format!("over {}", scheme(address)))?;
        }
        Ok(())
    });
}

#[test]
fn qemu_img_maps_holes() {
    against_primary("qemu-img map", &["qemu-img"], |cluster, addresses| {
        let source = cluster.dir().join("source");
        let source_arg = source.display().to_string();
        for (seed, address) in (0..).zip(addresses) {
            let places = make_sparse(&source, seed)?;
            run_ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &source_arg, address], LIMIT)?;
            let map = run_ok("qemu-img", &["map", "-f", "raw", "--output=json", address], LIMIT)?.stdout;
            let map: serde_json::Value = serde_json::from_str(&map).context("parse qemu-img's JSON")?;
            let mut found = Vec::new();
            for entry in map.as_array().context("a list of extents")? {
                let number = |key: &str| entry[key].as_u64().with_context(|| format!("{key} in {entry}"));
                if entry["data"].as_bool() == Some(true) {
                    found.extend(number("start")? / MIB..(number("start")? + number("length")?) / MIB);
                } else {
                    ensure!(entry["zero"].as_bool() == Some(true), "neither data nor zeroes: {entry}");
                }
            }
            ensure!(found == places, "data at {found:?} MiB, the source has it at {places:?}");
        }
        Ok(())
    });
}

#[test]
fn qemu_img_benches() {
    let name = "qemu-img bench";
    against_primary(name, &["qemu-img"], |_, addresses| {
        for address in addresses {
            for way in [&[][..], &["-w", "--flush-interval=64"], &["-w", "-s", "65536", "-c", "500"]] {
                let base = ["bench", "-f", "raw", "-t", "none", "-c", "4000", "-d", "32", "-s", "4096"];
                let done = run_ok("qemu-img", &[&base[..], way, &[address]].concat(), LIMIT)?;
                let time = done.stdout.lines().find(|line| line.starts_with("Run completed"));
                let time = time.with_context(|| format!("qemu-img bench: {}", done.text()))?;
                measured(name, &format!("{} {way:?}: {time}", scheme(address)));
            }
        }
        Ok(())
    });
}

/// Options of qemu that say where an address leads.
fn qemu_server(address: &str) -> Result<String> {
    let (address, export) = blkrepl_tests::nbd::Address::parse(address)?;
    let server = match address {
        blkrepl_tests::nbd::Address::Unix(path) => format!("server.type=unix,server.path={path}"),
        blkrepl_tests::nbd::Address::Tcp(host) => {
            let (host, port) = host.rsplit_once(':').context("a port")?;
            format!("server.type=inet,server.host={host},server.port={port}")
        }
    };
    Ok(format!("{server},export={export}"))
}

/// qemu-storage-daemon, which exports as `out` on `socket` what it is given at `address`.
fn storage_daemon(cluster: &Cluster, address: &str, socket: &Path) -> Result<Proc> {
    let mut command = Command::new("qemu-storage-daemon");
    let node = format!("driver=nbd,node-name=vol,reconnect-delay=60,{}", qemu_server(address)?);
    let listen = format!("addr.type=unix,addr.path={}", socket.display());
    command.args(["--blockdev", &format!("{node},discard=unmap"), "--nbd-server", &listen]);
    command.args(["--export", "type=nbd,id=out,node-name=vol,name=out,writable=on"]);
    let mut daemon = Proc::spawn("qemu-storage-daemon", &mut command, &cluster.dir().join("qsd.log"))?;
    let mut ended = false;
    wait_until("the socket of qemu-storage-daemon", LIMIT, || {
        ended = !matches!(daemon.exited(), Ok(None));
        ended || std::os::unix::net::UnixStream::connect(socket).is_ok()
    })?;
    ensure!(!ended, "qemu-storage-daemon ended at once: {}", daemon.output());
    Ok(daemon)
}

#[test]
fn qemu_storage_daemon_waits_for_a_primary_that_comes_back() {
    let tools = ["qemu-storage-daemon", "qemu-io"];
    against_primary("qemu-storage-daemon", &tools, |cluster, addresses| {
        let (primary, other) = (cluster.wait_primary(SYNC_LIMIT)?, cluster.secondary()?);
        let volume = cluster.volume().to_owned();
        let socket = cluster.dir().join("qsd.sock");
        let passed_on = format!("nbd+unix:///out?socket={}", socket.display());
        let mut daemon = storage_daemon(cluster, &addresses[0], &socket)?;
        qemu_io(&passed_on, &["write -P 0x41 1M 1M"])?;
        cluster.cli(&other, &["move", &volume, "--to", &other])?.ok()?;
        ensure!(cluster.wait_primary(FAILOVER_LIMIT)? == other, "the move did not happen");
        // Its server has closed the connection and refuses it now; the request waits.
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-c", "read -P 0x41 1M 1M", "-c", "write -P 0x42 2M 1M", &passed_on]);
        let mut waits = Proc::spawn("qemu-io", &mut command, &cluster.dir().join("qemu-io.log"))?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.cli(&primary, &["move", &volume, "--to", &primary])?.ok()?;
        ensure!(waits.wait(LIMIT)?.success(), "qemu-io: {}", waits.output());
        ensure!(waits.output().contains("wrote 1048576"), "qemu-io: {}", waits.output());
        qemu_io(&addresses[0], &["read -P 0x41 1M 1M", "read -P 0x42 2M 1M"])?;
        let status = daemon.end(rustix::process::Signal::TERM, LIMIT)?;
        ensure!(status.success(), "qemu-storage-daemon ended with {status}: {}", daemon.output());
        Ok(())
    });
}

#[test]
fn qemu_storage_daemon_passes_the_volume_on() {
    let tools = ["qemu-storage-daemon", "qemu-io", "qemu-img", "nbdcopy"];
    against_primary("qemu-storage-daemon", &tools, |cluster, addresses| {
        let (source, back) = (cluster.dir().join("source"), cluster.dir().join("back"));
        let socket = cluster.dir().join("qsd.sock");
        let passed_on = format!("nbd+unix:///out?socket={}", socket.display());
        for (seed, address) in (0..).zip(addresses) {
            let mut daemon = storage_daemon(cluster, address, &socket)?;
            make_sparse(&source, seed)?;
            let (source_arg, back_arg) = (source.display().to_string(), back.display().to_string());
            run_ok("nbdcopy", &["--flush", &source_arg, &passed_on], LIMIT)?;
            run_ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source_arg, address], LIMIT)?;
            qemu_io(&passed_on, &["write -P 0x3a 3M 1M", "write -z 17M 64k", "discard 60M 1M", "flush"])?;
            qemu_io(address, &["read -P 0x3a 3M 1M", "read -P 0 17M 64k", "read -P 0 60M 1M"])?;
            run_ok("nbdcopy", &[&passed_on, &back_arg], LIMIT)?;
            run_ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", &back_arg, address], LIMIT)?;
            let status = daemon.end(rustix::process::Signal::TERM, LIMIT)?;
            ensure!(status.success(), "qemu-storage-daemon ended with {status}: {}", daemon.output());
        }
        Ok(())
    });
}

#[test]
fn qemu_img_converts_and_compares() {
    against_primary("qemu-img", &["qemu-img"], |cluster, addresses| {
        let source = cluster.dir().join("source");
        // Data, a long hole, data: so that zeroes are written as such, and read back as such.
        files::make_random(&source, 20 * MIB, 7)?;
        OpenOptions::new().write(true).open(&source)?.set_len(SIZE)?;
        let source = source.display().to_string();
        for address in addresses {
            run_ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &source, address], LIMIT)?;
            let same = run_ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, address], LIMIT)?;
            ensure!(same.stdout.contains("identical"), "qemu-img compare: {}", same.text());
        }
        Ok(())
    });
}

#[test]
fn qemu_io_patterns_hold_at_any_alignment() {
    against_primary("qemu-io", &["qemu-io"], |_, addresses| {
        for address in addresses {
            let script = [
                "write -P 0x11 0 1M",
                "write -P 0x22 4096 4096",
                "write -P 0x33 8191 2",
                "write -f -P 0x44 1048575 65537",
                "flush",
                "read -P 0x11 0 4096",
                "read -P 0x22 4096 4095",
                "read -P 0x33 8191 2",
                "read -P 0x11 8193 1040382",
                "read -P 0x44 1048575 65537",
                "write -P 0x55 2M 32M",
                "read -P 0x55 2M 32M",
                "write -z 4M 1M",
                "write -z 6291457 1000",
                "discard 8M 2M",
                "discard 11534337 5000",
                "read -P 0 4M 1M",
                "read -P 0 6291457 1000",
                "read -P 0 8M 2M",
                "read -P 0 11534337 5000",
                "read -P 0x55 6291456 1",
                "read -P 0x55 6292457 4096",
                "read -P 0x55 11539337 100",
                "aio_write -P 0x66 40M 256k",
                "aio_write -P 0x66 41M 256k",
                "aio_write -P 0x66 42M 256k",
                "aio_flush",
                "read -P 0x66 41M 256k",
            ];
            let done = qemu_io(address, &script)?;
            let text = done.text();
            ensure!(!text.contains("verification failed") && !text.contains("error"), "qemu-io: {text}");
            // Beyond the end: an error, and the connection goes on.
            let past = run(
                Command::new("qemu-io")
                    .args(["-f", "raw", "-c", &format!("write {SIZE} 4096"), "-c", "read 0 512"])
                    .arg(address),
                LIMIT,
            )?;
            ensure!(past.text().contains("read 512/512"), "after a refused write: {}", past.text());
        }
        Ok(())
    });
}

fn qemu_io(address: &str, script: &[&str]) -> Result<Finished> {
    let mut command = Command::new("qemu-io");
    // Cache mode none-like writes would need O_DIRECT semantics that an export has not.
    command.args(["-f", "raw", "-t", "writeback", "-d", "unmap"]);
    for line in script {
        command.args(["-c", line]);
    }
    run(command.arg(address), LIMIT)?.ok()
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !has_fio_nbd() {
        skipped("fio_verifies_what_it_wrote", "fio with its nbd engine is not installed");
        return;
    }
    against_primary("fio", &["fio"], |cluster, addresses| {
        for (address, bs) in addresses.iter().zip(["4k", "512-64k"]) {
            let mut command = Command::new("fio");
            command.current_dir(cluster.dir()).args([
                "--name=verify",
                "--ioengine=nbd",
                "--thread",
                "--rw=randrw",
            ]);
            command.args(["--iodepth=16", "--size=48m", "--verify=crc32c", "--verify_fatal=1", "--fsync=64"]);
            command.arg(if bs.contains('-') { format!("--bsrange={bs}") } else { format!("--bs={bs}") });
            command.arg("--bs_unaligned=0").arg(format!("--uri={address}"));
            let done = run(&mut command, LIMIT)?.ok()?;
            ensure!(!done.text().contains("verify: bad"), "fio: {}", done.text());
            for line in done.stdout.lines().filter(|l| l.contains("IOPS=")) {
                measured("fio", &format!("{} bs {bs}: {}", scheme(address), line.trim()));
            }
        }
        Ok(())
    });
}

#[test]
fn four_jobs_of_fio_verify_what_they_wrote() {
    let name = "fio_jobs";
    if !has_fio_nbd() {
        skipped(name, "fio with its nbd engine is not installed");
        return;
    }
    against_primary(name, &["fio"], |cluster, addresses| {
        for address in addresses {
            let mut command = Command::new("fio");
            command.current_dir(cluster.dir()).args(["--name=jobs", "--ioengine=nbd", "--thread"]);
            // An area for each job: one must not overwrite what another verifies.
            command.args(["--numjobs=4", "--size=20m", "--offset_increment=24m", "--group_reporting"]);
            command.args(["--rw=randrw", "--bsrange=4k-64k", "--iodepth=16", "--fsync=128"]);
            command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
            let done = run(command.arg(format!("--uri={address}")), LIMIT)?.ok()?;
            ensure!(!done.text().contains("verify: bad"), "fio: {}", done.text());
            ensure!(done.stdout.contains("jobs=4"), "not four jobs: {}", done.stdout);
            for line in done.stdout.lines().filter(|line| line.contains("IOPS=")) {
                measured(name, &format!("{}: {}", scheme(address), line.trim()));
            }
        }
        Ok(())
    });
}

fn has_fio_nbd() -> bool {
    run(Command::new("fio").arg("--enghelp"), LIMIT)
        .is_ok_and(|done| done.text().lines().any(|line| line.trim() == "nbd"))
}

fn scheme(address: &str) -> &str {
    address.split("://").next().unwrap_or_default()
}
