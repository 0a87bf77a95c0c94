//! A primary that is stopped with SIGSTOP past its lease and woken again serves no stale read and
//! acknowledges no write: requests that wait in its sockets find another reign.

use std::time::Duration;

use anyhow::{Result, ensure};
use blkrepl_tests::client::{Link, Request};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::verify::{Verifier, VerifierOptions};
use blkrepl_tests::wait::wait_until;
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};
use rustix::process::Signal;

const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;
const OLD: u8 = 0x11;
const NEW: u8 = 0x22;
const NEVER: u8 = 0x33;

fn block(byte: u8) -> Vec<u8> {
    vec![byte; 4096]
}

/// Stops the primary and waits until another node serves; names of both.
fn pause_primary(cluster: &mut Cluster) -> Result<(String, String)> {
    let paused = cluster.wait_primary(FAILOVER_LIMIT)?;
    let other = cluster.secondary()?;
    cluster.signal(&paused, Signal::STOP)?;
    let address = cluster.node(&other)?.unix()?.to_owned();
    wait_until("another node to serve", FAILOVER_LIMIT, || {
        Link::connect(&address, Duration::from_secs(2)).is_ok()
    })?;
    Ok((paused, other))
}

/// [R23, R26, R27]: what waits in the sockets of a primary that lost its reign is dropped, unanswered.
#[test]
fn a_paused_primary_answers_nothing_that_is_stale() {
    with_cluster("pause_targeted", ClusterOptions::sized(SIZE), |cluster| {
        let primary = cluster.node(&cluster.wait_primary(FAILOVER_LIMIT)?)?;
        let mut old_link = Link::connect(primary.unix()?, FAILOVER_LIMIT)?;
        for index in 0..4 {
            old_link.write(index * BLOCK, &block(OLD))?;
        }
        old_link.flush()?;

        let (paused, other) = pause_primary(cluster)?;
        let mut new_link = Link::connect(cluster.node(&other)?.unix()?, FAILOVER_LIMIT)?;
        new_link.write(0, &block(NEW))?;

        // These wait in the paused node's socket, and are all it has to go on when it wakes.
        old_link.submit(&Request::Read { offset: 0, len: 4096 })?;
        old_link.submit(&Request::Read { offset: BLOCK, len: 4096 })?;
        old_link.submit(&Request::Write { offset: 2 * BLOCK, data: block(NEVER), fua: false })?;
        old_link.submit(&Request::Trim { offset: 3 * BLOCK, len: 4096 })?;
        old_link.submit(&Request::Flush)?;
        cluster.signal(&paused, Signal::CONT)?;
        // Any answer is wrong: the reads may be stale, the rest cannot be promised. A close is right.
        while let Ok(answer) = old_link.next(Duration::from_secs(8)) {
            ensure!(
                false,
                "the woken node answered request {}: {:?}",
                answer.handle,
                answer.result.map(|d| d.len())
            );
        }

        cluster.wait_in_sync(SYNC_LIMIT)?;
        let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
        ensure!(primary == other, "the role went back to {primary}");
        let expected = [NEW, OLD, OLD, OLD];
        for (index, byte) in expected.into_iter().enumerate() {
            let found = new_link.read(index as u64 * BLOCK, 4096)?;
            ensure!(found == block(byte), "block {index} holds {:#x}, expected {byte:#x}", found[0]);
        }
        cluster.compare_replicas()
    });
}

#[test]
fn pauses_of_any_length_under_load_lose_nothing() {
    with_cluster("pause_load", ClusterOptions::quick(SIZE), |cluster| {
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        // Shorter than the lease, about as long, and far past it.
        for pause_ms in [100, 350, 500, 650, 2500] {
            for of_primary in [true, false] {
                let load = verifier.start();
                load.wait_progress(200, FAILOVER_LIMIT)?;
                let node =
                    if of_primary { cluster.wait_primary(FAILOVER_LIMIT)? } else { cluster.secondary()? };
                cluster.signal(&node, Signal::STOP)?;
                std::thread::sleep(Duration::from_millis(pause_ms));
                cluster.signal(&node, Signal::CONT)?;
                load.wait_progress(500, FAILOVER_LIMIT)?;
                cluster.wait_in_sync(SYNC_LIMIT)?;
                load.stop()?;
                verifier.verify()?;
                cluster.compare_replicas()?;
            }
        }
        Ok(())
    });
}
