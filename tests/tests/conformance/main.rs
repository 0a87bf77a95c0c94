//! Conformance: what the NBD specification demands of a server, a case for each rule, asked of the real binary
//! over both kinds of socket, with each form of replies, while the volume is healthy, while it is degraded, and
//! while a resync runs. `docs/nbd.md` lists the rules and names the cases.
//!
//! The client is `blkrepl_tests::nbd`, which shares nothing with the server. Every reply of every case is also
//! judged by the rules of its form. No case knows anything of replication: a client must see no difference.

mod handshake;
mod requests;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkrepl_tests::binary::workspace;
use blkrepl_tests::bits::Random;
use blkrepl_tests::client::Link;
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::nbd::{Address, Form, Session, Talk};
use blkrepl_tests::report::{human, measured};
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};

const MIB: u64 = 1 << 20;
/// Where cases write. What is behind it is only there to be resynced.
const AREA: u64 = 64 * MIB;
/// What the first resync brings over; each further one so much more.
const DIRTY: u64 = 384 * MIB;
/// Resyncs that may end before the cases do, until the test gives up.
const RESYNCS: u64 = 3;
const SIZE: u64 = AREA + RESYNCS * DIRTY;

/// What a case is asked to look at.
struct Target<'a> {
    address: &'a Address,
    export: &'a str,
    form: Form,
    /// Whether a replica lacks what is written.
    degraded: bool,
}

impl Target<'_> {
    /// A connection that has agreed on the form, in its handshake.
    fn talk(&self) -> Result<Talk> {
        Talk::agreed(self.address, self.form)
    }

    /// A connection in its transmission phase, without metadata contexts.
    fn session(&self) -> Result<Session> {
        Ok(self.talk()?.go(self.export)?.0)
    }
}

/// For which forms a case is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    /// Once: it chooses its forms itself.
    Once,
    /// Each form.
    Each,
    /// Those without extended headers.
    Compact,
    /// Those with chunks.
    Chunks,
    /// Extended headers only.
    Extended,
}

impl For {
    fn forms(self) -> &'static [Form] {
        match self {
            Self::Once => &Form::ALL[..1],
            Self::Each => &Form::ALL,
            Self::Compact => &Form::ALL[..2],
            Self::Chunks => &Form::ALL[1..],
            Self::Extended => &Form::ALL[2..],
        }
    }
}

/// A case: the name of its rule, the forms it is for, and what it does.
type Case = (&'static str, For, fn(&Target<'_>) -> Result<()>);

/// A list of cases, each under the name of its function.
macro_rules! cases {
    ($($forms:ident: $($name:ident),+;)+) => {
        pub(super) const CASES: &[super::Case] =
            &[$($((stringify!($name), super::For::$forms, $name)),+),+];
    };
}
use cases;

/// Runs every case over both sockets in each form that it is for; how many that were.
fn run_all(cluster: &Cluster, state: &str, primary: &str) -> Result<usize> {
    let entry = cluster.node(primary)?;
    let mut asked = 0;
    for uri in [entry.unix()?, entry.tcp()?] {
        let (address, export) = Address::parse(uri)?;
        for (name, forms, case) in handshake::CASES.iter().chain(requests::CASES) {
            for form in forms.forms() {
                let degraded = state != "healthy";
                let target = Target { address: &address, export: &export, form: *form, degraded };
                let said = || format!("{name}, {form:?} replies over {}, {state} volume", address.kind());
                case(&target).with_context(said)?;
                asked += 1;
            }
        }
    }
    Ok(asked)
}

/// Bytes that a resync of `node` has still to look at; none if none is under way.
fn resyncs(cluster: &Cluster, node: &str) -> Result<Option<u64>> {
    let status = cluster.volume_status()?;
    let replica = status.replica(node)?;
    let under_way = replica.state == "resyncing" && replica.resync.is_some();
    Ok(if under_way { replica.dirty_bytes } else { None })
}

/// Writes what will have to be resynced.
fn make_dirty(address: &str, round: u64) -> Result<()> {
    let mut link = Link::connect(address, FAILOVER_LIMIT)?;
    let mut random = Random::new(round);
    let mut piece: Vec<u8> = (0..MIB / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    for at in AREA / MIB..(AREA + round * DIRTY) / MIB {
        piece[..8].copy_from_slice(&(at ^ round << 32).to_le_bytes());
        link.write(at * MIB, &piece)?;
    }
    link.flush()
}

fn report(state: &str, asked: usize, started: Instant) {
    measured("conformance", &format!("{asked} cases, {state} volume, {}", human(started.elapsed())));
}

/// Runs all cases while `away` gets what it lacks: from before the first to after the last.
fn run_during_resync(cluster: &mut Cluster, primary: &str, away: &str) -> Result<()> {
    let address = cluster.node(primary)?.unix()?.to_owned();
    let volume = cluster.volume().to_owned();
    let slow = ["volume", "set", &volume, "--resync-window", "4096", "--resync-latency", "1"];
    cluster.cli(primary, &slow)?.ok()?;
    for round in 1..=RESYNCS {
        make_dirty(&address, round)?;
        cluster.restart(away)?;
        wait_for("the resync to begin", SYNC_LIMIT, || resyncs(cluster, away)?.context("no resync yet"))?;
        let started = Instant::now();
        let asked = run_all(cluster, "resyncing", primary)?;
        if let Some(left) = resyncs(cluster, away)? {
            report("resyncing", asked, started);
            measured("conformance", &format!("resync {round}: {} MiB were left after the cases", left / MIB));
            return Ok(());
        }
        cluster.kill(away)?;
    }
    bail!("{RESYNCS} resyncs were over before the cases were")
}

#[test]
fn every_rule_holds_on_a_healthy_a_degraded_and_a_resyncing_volume() {
    with_cluster("conformance", ClusterOptions::sized(SIZE), |cluster| {
        let primary = cluster.wait_primary(SYNC_LIMIT)?;
        let started = Instant::now();
        let asked = run_all(cluster, "healthy", &primary)?;
        report("healthy", asked, started);

        let away = cluster.secondary()?;
        let entry = cluster.node(&away)?;
        for uri in [entry.unix()?, entry.tcp()?] {
            let (address, export) = Address::parse(uri)?;
            handshake::refuses_by_policy(&address, &export).with_context(|| format!("{away}, no primary"))?;
        }
        cluster.kill(&away)?;
        wait_for("the volume to be degraded", FAILOVER_LIMIT, || {
            let status = cluster.volume_status()?;
            ensure!(!status.in_sync.contains(&away), "{away} is in sync");
            Ok(())
        })?;
        let started = Instant::now();
        let asked = run_all(cluster, "degraded", &primary)?;
        report("degraded", asked, started);

        run_during_resync(cluster, &primary, &away)?;
        let volume = cluster.volume().to_owned();
        let quick = ["volume", "set", &volume, "--resync-window", "4194304", "--resync-latency", "100"];
        cluster.cli(&primary, &quick)?.ok()?;
        let status = cluster.wait_in_sync(SYNC_LIMIT.max(Duration::from_secs(180)))?;
        ensure!(status.primary.as_deref() == Some(&primary), "the primary moved");
        cluster.compare_replicas()
    });
}

/// The table of the rules says which case shows what, and none is forgotten there.
#[test]
fn every_case_is_named_by_the_table_of_rules() {
    let path = workspace().join("docs/nbd.md");
    let document = std::fs::read_to_string(&path).unwrap_or_else(|reason| panic!("{path:?}: {reason}"));
    let (_, rules) = document.split_once("\n## Rules of the specification\n").expect("a table of rules");
    let cases = handshake::CASES.iter().chain(requests::CASES);
    let missing: Vec<&str> =
        cases.map(|(name, ..)| *name).filter(|name| !rules.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "cases that no rule names: {missing:?}");
}
