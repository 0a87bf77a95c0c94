//! Holes and space: what clients give up takes no space on either replica, what they are told of it is true,
//! also after a resync and at the next primary, and they see what a missing replica lacks.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blkrepl_tests::client::Link;
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::proc::{missing, run_ok};
use blkrepl_tests::report::{measured, skipped};
use blkrepl_tests::{ClusterOptions, with_cluster};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
const LIMIT: Duration = Duration::from_secs(60);

/// What `nbdinfo --map` says: from where, how long, which flags; neighbours that are alike are one.
fn map(address: &str, context: &str) -> Result<Vec<(u64, u64, u64)>> {
    let option = format!("--map={context}");
    let text = run_ok("nbdinfo", &["--json", option.as_str(), address], LIMIT)?.stdout;
    let entries: Vec<serde_json::Value> = serde_json::from_str(&text).context("parse nbdinfo's JSON")?;
    let mut out: Vec<(u64, u64, u64)> = Vec::new();
    for entry in entries {
        let number = |key: &str| entry[key].as_u64().with_context(|| format!("{key} in {entry}"));
        let (start, len, flags) = (number("offset")?, number("length")?, number("type")?);
        match out.last_mut() {
            Some(last) if last.2 == flags && last.0 + last.1 == start => last.1 += len,
            _ => out.push((start, len, flags)),
        }
    }
    Ok(out)
}

/// Of a map: where the flags are set, in MiB.
fn places(map: &[(u64, u64, u64)], flags: u64) -> Vec<(u64, u64)> {
    map.iter().filter(|m| m.2 == flags).map(|m| (m.0 / MIB, m.1 / MIB)).collect()
}

fn qemu_io(address: &str, commands: &[&str]) -> Result<()> {
    let mut args = vec!["-f", "raw", "-d", "unmap"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(address);
    run_ok("qemu-io", &args, LIMIT).map(drop)
}

#[test]
fn what_is_given_up_is_a_hole_on_both_replicas_after_a_resync_and_after_a_move() {
    let name = "allocation";
    if let Some(reason) = missing(&["nbdinfo", "qemu-io"]) {
        return skipped(name, &reason);
    }
    with_cluster(name, ClusterOptions::sized(SIZE), |cluster| {
        let primary = cluster.wait_primary(SYNC_LIMIT)?;
        let address = cluster.node(&primary)?.unix()?.to_owned();
        let allocation = |address: &str| map(address, "base:allocation");
        ensure!(allocation(&address)? == [(0, SIZE, 3)], "a new volume is one hole");
        let mut link = Link::connect(&address, LIMIT)?;
        for at in (0..8).chain([16]) {
            link.write(at * MIB, &vec![0xaa; MIB as usize])?;
        }
        qemu_io(&address, &["discard 2M 2M", "write -zu 5M 1M"])?;
        let seen = allocation(&address)?;
        let data = places(&seen, 0);
        ensure!(data == [(0, 2), (4, 1), (6, 2), (16, 1)], "data at {data:?} MiB of {seen:?}");
        ensure!(places(&map(&address, "blkrepl:dirty")?, 1).is_empty(), "dirty while in sync");

        let away = cluster.secondary()?;
        cluster.kill(&away)?;
        link.write(32 * MIB, &vec![0xbb; MIB as usize])?;
        qemu_io(&address, &["discard 16M 1M"])?;
        let dirty = map(&address, "blkrepl:dirty")?;
        for place in [16, 32] {
            let lacks =
                |m: &&(u64, u64, u64)| m.2 == 1 && m.0 <= place * MIB && (place + 1) * MIB <= m.0 + m.1;
            ensure!(dirty.iter().find(lacks).is_some(), "{away} lacks {place} MiB, not in {dirty:?}");
        }
        drop(link);
        cluster.restart(&away)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        let before = allocation(&address)?;
        let data = places(&before, 0);
        ensure!(data == [(0, 2), (4, 1), (6, 2), (32, 1)], "data at {data:?} MiB of {before:?}");
        let taken = cluster.space()?;
        measured(name, &format!("6 MiB of data take {taken:?} bytes"));
        ensure!(taken.iter().all(|taken| (6 * MIB..8 * MIB).contains(taken)), "space taken: {taken:?}");

        cluster.cli(&away, &["move", cluster.volume(), "--to", &away])?.ok()?;
        ensure!(cluster.wait_primary(FAILOVER_LIMIT)? == away, "the move did not happen");
        let after = allocation(cluster.node(&away)?.unix()?)?;
        ensure!(after == before, "{after:?} at the new primary, {before:?} at the old one");
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}
