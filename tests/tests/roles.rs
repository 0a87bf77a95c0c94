//! Who is primary, by an operator's word: promote, forced promotion, demote, move. A refusal gives the
//! reason and the next step; a move loses nothing; nothing moves a role back. And what else an operator sets.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use blkrepl_tests::client::{Link, LinkError};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::proc::Finished;
use blkrepl_tests::report::{human, measured};
use blkrepl_tests::verify::{Verifier, VerifierOptions, connect_any};
use blkrepl_tests::wait::{wait_for, wait_until};
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};

const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;

fn refused(done: &Finished, words: &[&str]) -> Result<()> {
    ensure!(done.code() == 1, "{}: exit code {}, expected 1\n{}", done.shown, done.code(), done.text());
    ensure!(!done.stderr.trim().is_empty(), "{}: refused without a reason on stderr", done.shown);
    for word in words {
        ensure!(done.stderr.contains(word), "{}: the refusal lacks {word:?}: {}", done.shown, done.stderr);
    }
    Ok(())
}

fn wait_primary_is(cluster: &Cluster, node: &str) -> Result<()> {
    wait_until(&format!("{node} as primary"), FAILOVER_LIMIT, || {
        cluster.wait_primary(Duration::from_secs(2)).is_ok_and(|primary| primary == node)
    })
}

/// Leaves `behind` out of the in-sync set with older content, alone with the witness.
fn only_the_stale_one_is_left(cluster: &mut Cluster) -> Result<(String, String)> {
    let ahead = cluster.wait_primary(FAILOVER_LIMIT)?;
    let behind = cluster.secondary()?;
    let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
    link.write(0, &[0x11; 4096])?;
    link.flush()?;
    cluster.kill(&behind)?;
    // This one goes through only after the removal is committed.
    link.write(BLOCK, &[0x22; 4096])?;
    link.flush()?;
    cluster.kill(&ahead)?;
    cluster.restart(&behind)?;
    wait_for("the node's status", FAILOVER_LIMIT, || cluster.status_of(&behind))?;
    Ok((ahead, behind))
}

#[test]
fn promote_is_refused_without_force_and_force_starts_a_new_lineage() {
    with_cluster("promote_force", ClusterOptions::sized(SIZE), |cluster| {
        let (ahead, behind) = only_the_stale_one_is_left(cluster)?;
        let volume = cluster.volume().to_owned();
        // Given time, the failover controller must still not choose it.
        std::thread::sleep(Duration::from_secs(5));
        let status = wait_for("a status", FAILOVER_LIMIT, || cluster.volume_status())?;
        ensure!(!status.in_sync.contains(&behind), "{behind} counts as in sync: {:?}", status.in_sync);
        ensure!(status.primary.as_deref() != Some(&behind), "{behind} was promoted by itself");
        refused(&cluster.cli(&behind, &["promote", &volume])?, &["--force", "in sync"])?;

        cluster.cli(&behind, &["promote", &volume, "--force"])?.ok()?;
        wait_primary_is(cluster, &behind)?;
        let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
        ensure!(link.read(0, 4096)? == [0x11; 4096], "what both had is there");
        ensure!(link.read(BLOCK, 4096)? == [0; 4096], "the discarded write is there");
        link.write(2 * BLOCK, &[0x33; 4096])?;

        // The other returns with a write that the new lineage does not know: thrown away, and said so.
        cluster.restart(&ahead)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        wait_primary_is(cluster, &behind)?;
        let events = cluster.events(&behind)?;
        ensure!(events.iter().any(|e| e["kind"] == "discarding"), "no event tells what was discarded");
        ensure!(link.read(BLOCK, 4096)? == [0; 4096], "the discarded write came back");
        cluster.compare_replicas()
    });
}

#[test]
fn a_member_that_returns_makes_force_unnecessary() {
    with_cluster("wait_for_member", ClusterOptions::sized(SIZE), |cluster| {
        let (ahead, _) = only_the_stale_one_is_left(cluster)?;
        cluster.restart(&ahead)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        wait_primary_is(cluster, &ahead)?;
        let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
        ensure!(link.read(BLOCK, 4096)? == [0x22; 4096], "an acknowledged write is lost");
        cluster.compare_replicas()
    });
}

#[test]
fn demote_ends_service_until_an_operator_promotes() {
    with_cluster("demote", ClusterOptions::quick(SIZE), |cluster| {
        let volume = cluster.volume().to_owned();
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        let load = verifier.start();
        load.wait_progress(500, FAILOVER_LIMIT)?;
        load.stop()?;
        let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
        let secondary = cluster.secondary()?;
        cluster.cli(&primary, &["demote", &volume])?.ok()?;
        wait_until("no primary", FAILOVER_LIMIT, || {
            cluster.volume_status().is_ok_and(|v| v.primary.is_none())
        })?;
        for node in [&primary, &secondary] {
            let answer = Link::connect(cluster.node(node)?.unix()?, Duration::from_secs(5));
            ensure!(matches!(answer, Err(LinkError::NotPrimary(_))), "{node} serves a demoted volume");
        }
        // Several leases long: nobody may step in.
        std::thread::sleep(Duration::from_secs(3));
        ensure!(cluster.volume_status()?.primary.is_none(), "the failover controller ignored the operator");
        cluster.cli(&secondary, &["promote", &volume])?.ok()?;
        wait_primary_is(cluster, &secondary)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        verifier.verify()?;
        cluster.compare_replicas()
    });
}

#[test]
fn move_stalls_clients_briefly_and_loses_nothing() {
    with_cluster("move", ClusterOptions::sized(SIZE), |cluster| {
        let volume = cluster.volume().to_owned();
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        for round in 0..6 {
            let load = verifier.start();
            load.wait_progress(500, FAILOVER_LIMIT)?;
            let (from, to) = (cluster.wait_primary(FAILOVER_LIMIT)?, cluster.secondary()?);
            let started = Instant::now();
            // Asked at either end, by either word: a promote while a primary lives is a move [R18].
            if round % 3 == 2 {
                cluster.cli(&to, &["promote", &volume])?.ok()?;
            } else {
                let ask = if round % 3 == 0 { &from } else { &to };
                cluster.cli(ask, &["move", &volume, "--to", &to])?.ok()?;
            }
            let command = started.elapsed();
            load.wait_progress(500, FAILOVER_LIMIT)?;
            let status = cluster.wait_in_sync(SYNC_LIMIT)?;
            let report = load.stop()?;
            ensure!(status.primary.as_deref() == Some(&to), "primary is {:?}, expected {to}", status.primary);
            let stall = human(report.stall_max);
            measured(
                "move",
                &format!("clients stalled {stall} (aim: 200 ms), command took {}", human(command)),
            );
            verifier.verify()?;
        }
        cluster.compare_replicas()
    });
}

#[test]
fn commands_that_cannot_be_done_say_why_and_exit_with_1_or_2() {
    with_cluster("refusals", ClusterOptions::quick(SIZE), |cluster| {
        let volume = cluster.volume().to_owned();
        let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
        let witness = cluster.witness()?;
        refused(&cluster.cli(&primary, &["promote", "no-such-volume"])?, &["no-such-volume"])?;
        refused(&cluster.cli(&primary, &["move", &volume, "--to", "n9"])?, &["n9"])?;
        refused(&cluster.cli(&primary, &["move", &volume, "--to", &witness])?, &[&witness])?;
        refused(&cluster.cli(&primary, &["volume", "create", &volume, "--size", "64MiB"])?, &[&volume])?;
        let done = cluster.cli(&primary, &["move", &volume])?;
        ensure!(done.code() == 2, "usage: exit code {}", done.code());
        let away = cluster.secondary()?;
        cluster.kill(&away)?;
        refused(&cluster.cli(&away, &["status"])?, &["admin.sock"])?;
        wait_until("the removal", FAILOVER_LIMIT, || {
            cluster
                .volume_status()
                .is_ok_and(|v| !v.in_sync.contains(&away) && v.primary.as_deref() == Some(&primary))
        })?;
        refused(&cluster.cli(&primary, &["move", &volume, "--to", &away])?, &[&away])?;
        wait_primary_is(cluster, &primary)?;
        cluster.restart(&away)?;
        cluster.wait_in_sync(SYNC_LIMIT).map(drop)
    });
}

/// Two creations of one name that begin on different nodes: one succeeds, on both nodes, whatever the other
/// had made there already.
#[test]
fn of_two_creations_of_one_name_one_succeeds_whole() {
    with_cluster("create_race", ClusterOptions::quick(SIZE), |cluster| {
        for round in 0..5 {
            let name = format!("twin{round}");
            let codes: Vec<i32> = std::thread::scope(|scope| {
                let asked: Vec<_> = [("n1", "n1,n2"), ("n2", "n2,n1")]
                    .map(|(at, replicas)| {
                        let args = ["volume", "create", &name, "--size", "16MiB", "--replicas", replicas];
                        let (cluster, args) = (&*cluster, args.map(str::to_owned));
                        scope.spawn(move || {
                            let args: Vec<&str> = args.iter().map(String::as_str).collect();
                            cluster.cli(at, &args).map(|done| done.code())
                        })
                    })
                    .into_iter()
                    .collect();
                asked.into_iter().map(|a| a.join().expect("it does not panic")).collect::<Result<_>>()
            })?;
            ensure!(codes.contains(&0), "nobody created {name}: {codes:?}");
            wait_for("both replicas of the new volume", SYNC_LIMIT, || {
                let status = cluster.status_of("n1")?;
                let volume = status.volume(&name)?;
                volume.all_in_sync()?;
                ensure!(volume.in_sync.len() == 2, "in sync are {:?}", volume.in_sync);
                Ok(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn settings_change_under_load_on_every_node() {
    with_cluster("settings", ClusterOptions::sized(SIZE), |cluster| {
        let volume = cluster.volume().to_owned();
        let (primary, secondary) = (cluster.wait_primary(FAILOVER_LIMIT)?, cluster.secondary()?);
        let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
        link.write(0, &[0x33; 4096])?;
        let set = |options: &[&str]| {
            let words: Vec<&str> = ["volume", "set", &volume].iter().chain(options).copied().collect();
            cluster.cli(&secondary, &words)
        };
        let done = set(&["--resync-latency", "3", "--resync-window", "8MiB"])?.ok()?;
        ensure!(done.stdout.contains("resync-latency 3 ms, resync-window 8 MiB"), "{}", done.stdout);
        set(&["--resync-latency", "3"])?.ok()?;
        for node in [&primary, &secondary] {
            wait_for("the settings", FAILOVER_LIMIT, || {
                let shown = cluster.cli(node, &["volume", "show", &volume, "--json"])?.ok()?;
                let shown: serde_json::Value = serde_json::from_str(&shown.stdout)?;
                let settings = &shown["settings"];
                ensure!(settings["resync_latency_ms"] == 3, "{settings}");
                ensure!(settings["resync_window_bytes"] == 8 << 20, "{settings}");
                ensure!(settings["peer_timeout_ms"] == 1000, "what is not named stays: {settings}");
                Ok(())
            })?;
        }
        link.write(BLOCK, &[0x44; 4096])?;
        link.flush()?;
        refused(&set(&[])?, &["at least one setting", "--help"])?;
        refused(&set(&["--resync-latency", "0"])?, &["resync_latency_budget", "1ms"])?;
        refused(&set(&["--resync-window", "1"])?, &["resync_window_bytes", "4096"])?;
        refused(&cluster.cli(&primary, &["volume", "set", "vol9", "--resync-latency", "3"])?, &["vol9"])?;
        ensure!(link.read(0, 4096)? == [0x33; 4096], "the link is the same and reads what it wrote");
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}
