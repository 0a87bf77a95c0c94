//! Clients that say anything: 10,000 random negotiations and 1,000,000 random requests, right and wrong, against
//! the real binary. None is answered wrongly, no process ends, none takes memory without bound, and the volume is
//! served correctly afterwards.
//!
//! A quarter as many requests again while the secondary is killed and comes back, over and over. And clients that
//! hoard: they ask for the longest replies and take none, or announce the longest payloads and send none. The nodes'
//! memory stays within what the document of the architecture says, and others are served.
//!
//! `BLKREPL_SEED` repeats a run; `BLKREPL_NBD_ROUNDS=N` makes N times as many of both.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_tests::bits::{Random, fresh_seed, mix};
use blkrepl_tests::cluster::SYNC_LIMIT;
use blkrepl_tests::nbd::spec::{NBD_CMD_READ, NBD_CMD_WRITE_ZEROES, NBD_FLAG_SEND_FAST_ZERO};
use blkrepl_tests::nbd::{Address, Form, Load, Outcome, Request, Session, Talk, negotiate};
use blkrepl_tests::report::{human, measured, step};
use blkrepl_tests::usage::Memory;
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};

const NAME: &str = "nbd_random";
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const NEGOTIATIONS: u64 = 10_000;
const REQUESTS: u64 = 1_000_000;
/// Threads that negotiate; half over each kind of socket.
const TALKERS: u64 = 4;
/// What one load has for itself, and what all of them share.
const AREA: u64 = 4 * MIB;
/// The most that a node may have resident while requests are asked; it takes about 20 MiB, and may still keep buffers
/// of what went before. Payloads of 32 MiB are sent to be thrown away by six clients.
const RESIDENT_MAX: u64 = 80 * MIB;

/// How often the secondary is lost under a load.
const LOSSES: u32 = 3;
/// Clients that hoard, a quarter of them writing. They ask for much more than client bytes have room for; who waits
/// for that gets his turn when those who move nothing have been closed.
const HOARDERS: u64 = 40;
/// Requests of each.
const HOARDED: u64 = 64;
/// The longest payload.
const PAYLOAD_MAX: u64 = 32 * MIB;
/// Client bytes of a volume, free buffers, and the rest of the node.
const HOARD_MAX: u64 = (256 + 64) * MIB + RESIDENT_MAX;

/// How many times as much as usual is wanted.
fn rounds() -> u64 {
    std::env::var("BLKREPL_NBD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Runs `body` for each number below `count`, each on a thread of its own.
fn at_once<T: Send>(count: u64, body: impl Fn(u64) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                let body = &body;
                scope.spawn(move || body(number))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))?).collect()
    })
}

/// Names, pids and largest memory of all nodes.
fn processes(cluster: &Cluster) -> Result<Vec<(String, u32, u64)>> {
    let nodes = cluster.nodes()?;
    nodes
        .into_iter()
        .map(|node| {
            ensure!(cluster.runs(&node.name)?, "{} does not run", node.name);
            let (pid, memory) = (cluster.process(&node.name)?, cluster.memory(&node.name)?);
            Ok((node.name, pid, memory.peak))
        })
        .collect()
}

/// That the same processes run, never took too much memory, and said nothing of a panic.
fn check_processes(cluster: &Cluster, before: &[(String, u32, u64)], when: &str, most: u64) -> Result<()> {
    for ((name, pid, peak), (_, old, _)) in processes(cluster)?.iter().zip(before) {
        ensure!(pid == old, "{name} was pid {old}, and is pid {pid} after {when}");
        measured(
            NAME,
            &format!("{name} after {when}: at most {:.1} MiB resident", *peak as f64 / MIB as f64),
        );
        ensure!(*peak <= most, "{name} after {when}: {peak} bytes resident, at most {most}");
        let log = cluster.node(name)?.config.with_file_name("log");
        let text = std::fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
        ensure!(!text.contains("panicked"), "{name} panicked; see {}", log.display());
    }
    Ok(())
}

fn negotiations(addresses: &[(Address, String); 2], seed: u64) -> Result<()> {
    let count = NEGOTIATIONS * rounds() / TALKERS;
    at_once(TALKERS, |number| {
        let (address, export) = &addresses[(number % 2) as usize];
        let mut random = Random::new(mix(seed ^ number));
        for n in 0..count {
            negotiate(address, export, &mut random)
                .with_context(|| format!("seed {seed}, negotiation {n} of thread {number}"))?;
        }
        Ok(())
    })
    .map(drop)
}

/// At least so many requests, from all loads at once, and on until `stop` is set.
fn requests(addresses: &[(Address, String); 2], seed: u64, count: u64, stop: &AtomicBool) -> Result<Outcome> {
    let loads = 2 * Form::ALL.len() as u64;
    let count = count.div_ceil(loads);
    let outcomes = at_once(loads, |number| {
        let (address, export) = addresses[(number % 2) as usize].clone();
        let form = Form::ALL[(number / 2) as usize];
        let area = (number + 1) * AREA..(number + 2) * AREA;
        let seed = mix(seed ^ (number + 100));
        let (_session, told) = Talk::agreed(&address, form)?.go(&export)?;
        let fast_zero = told.flags & NBD_FLAG_SEND_FAST_ZERO != 0;
        let load = Load { address, export, size: SIZE, form, fast_zero, area, shared: 0..AREA, seed };
        load.run_until(count, stop)
    })?;
    Ok(outcomes.into_iter().fold(Outcome::default(), |sum, one| Outcome {
        answered: sum.answered + one.answered,
        refused: sum.refused + one.refused,
        compared: sum.compared + one.compared,
        connections: sum.connections + one.connections,
    }))
}

/// Noise that was taken for requests may have written where loads expect zeroes.
fn clear((address, export): &(Address, String)) -> Result<()> {
    let (mut session, _) = Talk::agreed(address, Form::Structured)?.go(export)?;
    session.done(Request::new(NBD_CMD_WRITE_ZEROES, 0, 0, SIZE)).map(drop)
}

/// A write and a read in each form over each socket.
fn still_serves(addresses: &[(Address, String); 2]) -> Result<()> {
    for (address, export) in addresses {
        for (n, form) in (1..).zip(Form::ALL) {
            let (mut session, _) = Talk::agreed(address, form)?.go(export)?;
            session.write(SIZE - MIB, &[n; 8192])?;
            ensure!(session.read(SIZE - MIB, 8192)? == [n; 8192], "{form:?} over {}", address.kind());
            session.disconnect()?;
        }
    }
    Ok(())
}

#[test]
fn whatever_clients_say_the_volume_is_served_correctly() {
    with_cluster(NAME, ClusterOptions::sized(SIZE), |cluster| {
        let seed = fresh_seed();
        step(NAME, &format!("seed {seed}"));
        let primary = cluster.node(&cluster.wait_primary(SYNC_LIMIT)?)?;
        let addresses = [Address::parse(primary.unix()?)?, Address::parse(primary.tcp()?)?];
        let before = processes(cluster)?;

        let started = Instant::now();
        negotiations(&addresses, seed)?;
        let count = NEGOTIATIONS * rounds();
        measured(NAME, &format!("seed {seed}: {count} negotiations in {}", human(started.elapsed())));
        // Noise may turn out to be a request for 32 MiB, in all of them at once.
        let most = RESIDENT_MAX + TALKERS * PAYLOAD_MAX;
        check_processes(cluster, &before, "the negotiations", most)?;
        before.iter().try_for_each(|(_, pid, _)| Memory::reset_peak(*pid))?;
        clear(&addresses[0])?;

        let started = Instant::now();
        let outcome = requests(&addresses, seed, REQUESTS * rounds(), &AtomicBool::new(true))?;
        let Outcome { answered, refused, compared, connections } = outcome;
        ensure!(answered >= REQUESTS * rounds(), "{answered} requests answered");
        ensure!(refused > answered / 20, "{refused} of {answered} requests refused: too few were wrong");
        ensure!(compared > answered * 256, "{compared} bytes compared: too few for {answered} requests");
        let rate = answered as f64 / started.elapsed().max(Duration::from_millis(1)).as_secs_f64();
        let text = format!("{answered} requests, {refused} refused, on {connections} connections");
        let text = format!("seed {seed}: {text}; {} MiB compared; {rate:.0} in a second", compared / MIB);
        measured(NAME, &text);
        check_processes(cluster, &before, "the requests", RESIDENT_MAX)?;

        still_serves(&addresses)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

/// Kills a node, lets the volume go on without it, and has it back in sync.
fn lose_for_a_while(cluster: &mut Cluster, away: &str) -> Result<()> {
    cluster.kill(away)?;
    wait_for("the volume to be degraded", SYNC_LIMIT, || {
        let in_sync = cluster.volume_status()?.in_sync;
        ensure!(!in_sync.iter().any(|node| node == away), "{away} is in sync");
        Ok(())
    })?;
    cluster.restart(away)?;
    cluster.wait_in_sync(SYNC_LIMIT).map(drop)
}

#[test]
fn random_requests_are_answered_correctly_while_the_secondary_goes_and_comes() {
    let name = "nbd_random_loss";
    with_cluster(name, ClusterOptions::sized(SIZE), |cluster| {
        let seed = fresh_seed();
        step(name, &format!("seed {seed}"));
        let primary = cluster.node(&cluster.wait_primary(SYNC_LIMIT)?)?;
        let away = cluster.secondary()?;
        let addresses = [Address::parse(primary.unix()?)?, Address::parse(primary.tcp()?)?];
        let stop = AtomicBool::new(false);
        let outcome = std::thread::scope(|scope| {
            let load = scope.spawn(|| requests(&addresses, seed, REQUESTS / 4 * rounds(), &stop));
            let lost = (0..LOSSES).try_for_each(|_| lose_for_a_while(cluster, &away));
            // The loads end in any case, or this would wait for them for ever.
            stop.store(true, Ordering::Relaxed);
            let outcome = load.join().map_err(|_| anyhow!("a load panicked"))?;
            lost.and(outcome)
        })?;
        let Outcome { answered, compared, .. } = outcome;
        let text = format!("{answered} requests, {} MiB compared", compared / MIB);
        measured(name, &format!("seed {seed}: {text}, {LOSSES} losses of the secondary"));
        still_serves(&addresses)?;
        ensure!(cluster.wait_primary(SYNC_LIMIT)? == primary.name, "the primary moved");
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

/// A client that asks for much and takes nothing, or announces much and sends nothing.
fn hoard((address, export): &(Address, String), number: u64) -> Result<Session> {
    let form = Form::ALL[(number % 3) as usize];
    let (mut session, _) = Talk::agreed(address, form)?.go(export)?;
    if number.is_multiple_of(4) {
        let head = Request::write(form, 0, &[]);
        session.wire.send(&Request { len: PAYLOAD_MAX, ..head }.bytes(form))?;
    } else {
        session.wire.stop_listening();
        let read = |n| Request::new(NBD_CMD_READ, 0, n % 2 * PAYLOAD_MAX, PAYLOAD_MAX).named(n);
        let bytes: Vec<u8> = (0..HOARDED).flat_map(|n| read(n).bytes(form)).collect();
        session.wire.send(&bytes)?;
    }
    Ok(session)
}

#[test]
fn clients_that_hoard_neither_take_all_memory_nor_stop_the_others() {
    with_cluster("nbd_hoarders", ClusterOptions::sized(SIZE), |cluster| {
        let primary = cluster.node(&cluster.wait_primary(SYNC_LIMIT)?)?;
        let addresses = [Address::parse(primary.unix()?)?, Address::parse(primary.tcp()?)?];
        let before = processes(cluster)?;
        let (mut session, _) = Talk::agreed(&addresses[0].0, Form::Structured)?.go(&addresses[0].1)?;
        // Reads of zeroes would be answered in a few bytes.
        for at in (0..SIZE).step_by(PAYLOAD_MAX as usize) {
            session.write(at, &vec![0x88; PAYLOAD_MAX as usize])?;
        }
        drop(session);
        let hoarders: Vec<Session> = (0..HOARDERS)
            .map(|number| hoard(&addresses[(number % 2) as usize], number))
            .collect::<Result<_>>()?;
        let started = Instant::now();
        still_serves(&addresses)?;
        let text =
            format!("beside {HOARDERS} hoarders six sessions were served in {}", human(started.elapsed()));
        measured("nbd_hoarders", &text);
        check_processes(cluster, &before, "hoarding", HOARD_MAX)?;
        drop(hoarders);
        wait_for("the memory to be given back", SYNC_LIMIT, || {
            let resident = cluster.memory(&primary.name)?.resident;
            ensure!(resident <= RESIDENT_MAX, "{resident} bytes resident, at most {RESIDENT_MAX}");
            Ok(())
        })?;
        still_serves(&addresses)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}
