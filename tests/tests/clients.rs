//! Real NBD clients against the primary: nbdinfo, nbdcopy, qemu-img, qemu-io, fio. Each must run clean,
//! and what went in must come out. A node that is not primary refuses and says who is.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blkrepl_tests::client::{Link, LinkError};
use blkrepl_tests::cluster::SYNC_LIMIT;
use blkrepl_tests::proc::{Finished, missing, run, run_ok};
use blkrepl_tests::report::{measured, skipped};
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

#[test]
fn qemu_img_converts_and_compares() {
    against_primary("qemu-img", &["qemu-img"], |cluster, addresses| {
        let source = cluster.dir().join("source");
        // Data, a long hole, data: so that zeroes are written as such, and read back as such.
        files::make_random(&source, 20 * MIB, 7)?;
        std::fs::OpenOptions::new().write(true).open(&source)?.set_len(SIZE)?;
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

fn has_fio_nbd() -> bool {
    run(Command::new("fio").arg("--enghelp"), LIMIT)
        .is_ok_and(|done| done.text().lines().any(|line| line.trim() == "nbd"))
}

fn scheme(address: &str) -> &str {
    address.split("://").next().unwrap_or_default()
}
