//! What each system is told to do in its turn: the loads, what fails, the resyncs.

use anyhow::{Context, Result};

use super::figures::{Figures, Row};
use super::writer::Seen;
use super::{Guest, NAME, loads};
use crate::report::step;

/// What is done to a system while the writer writes.
struct Fault {
    row: Row,
    /// What the writer does not see.
    before: &'static str,
    /// What it sees, and the seconds for which it writes on after that.
    during: (&'static str, u32),
    after: &'static str,
}

/// A system under test.
pub(super) struct System {
    pub(super) name: &'static str,
    device: &'static str,
    /// The beginnings of its steps' names in `guest.sh`.
    steps: &'static str,
    faults: &'static [Fault],
    /// How a resync is asked for: its row in the table, and what stands behind the MiB.
    resyncs: &'static [(&'static str, &'static str)],
    /// The step that hands the role over, if it is not a fault.
    hands_over: Option<&'static str>,
    /// The step that connects the kernel's client to it, over so many connections.
    client: Option<&'static str>,
    /// What is not measured, in words.
    words: &'static [(Row, &'static str)],
}

const DRBD_TUNED: &str = "--c-plan-ahead=0 --resync-rate=400M --c-min-rate=0";

/// All of them.
pub(super) const SYSTEMS: [System; 3] = [
    System {
        name: "not replicated",
        device: "/dev/nbd0",
        steps: "plain",
        faults: &[Fault { row: Row::PrimaryKilled, before: "", during: ("plain_kill", 3), after: ":" }],
        resyncs: &[],
        hands_over: None,
        client: None,
        words: &[
            (Row::Moved, "there is no other one"),
            (Row::SecondaryEnds, "-"),
            (Row::SecondarySilent, "-"),
            (Row::SecondaryBack, "-"),
        ],
    },
    System {
        name: "blkrepl",
        device: "/dev/nbd0",
        steps: "own",
        faults: &[
            Fault {
                row: Row::PrimaryKilled,
                before: "p=$(own_primary); s=$((3 - p))",
                during: ("own_kill $p 9", 10),
                after: "own_return $p",
            },
            Fault { row: Row::Moved, before: "", during: ("own_move", 4), after: "within 60 own_in_sync" },
            Fault {
                row: Row::SecondaryEnds,
                before: "s=$(own_secondary)",
                during: ("own_kill $s 9", 5),
                after: "echo $s >/run/away",
            },
            Fault {
                row: Row::SecondaryBack,
                before: "s=$(cat /run/away)",
                during: ("own_return $s", 1),
                after: ":",
            },
            Fault {
                row: Row::SecondarySilent,
                before: "s=$(own_secondary)",
                during: ("kill -STOP $(cat /data/n$s/pid)", 12),
                after: "kill -CONT $(cat /data/n$s/pid); sleep 1; within 60 own_in_sync",
            },
        ],
        resyncs: &[("", "")],
        hands_over: None,
        client: Some("own_client"),
        words: &[],
    },
    System {
        name: "DRBD",
        device: "/dev/drbd0",
        steps: "drbd",
        faults: &[
            Fault { row: Row::SecondaryEnds, before: "", during: ("drbdsetup down r1", 5), after: ":" },
            Fault { row: Row::SecondaryBack, before: "", during: ("drbd_return", 1), after: ":" },
            Fault { row: Row::SecondarySilent, before: "", during: ("drbd_silence", 2), after: "drbd_sound" },
        ],
        resyncs: &[("", ""), ("tuned", DRBD_TUNED)],
        hands_over: Some("drbd_move"),
        client: None,
        words: &[(
            Row::PrimaryKilled,
            "the client dies with it: the device is on the primary's machine only",
        )],
    },
];

impl System {
    /// One turn: it is started, measured and stopped.
    pub(super) fn turn(&self, guest: &Guest, figures: &mut Figures, first: bool) -> Result<()> {
        guest.steps(&format!("{}_up >/dev/null", self.steps))?;
        if first {
            // So that no block is met for the first time later.
            guest.steps(&format!("change {} $SIZE_MIB", self.device))?;
        }
        let wants = |part| guest.options.wants(part);
        if wants("loads") {
            self.loads(guest, figures)?;
        }
        if wants("connections")
            && let Some(client) = self.client
        {
            figures.connections.measure(guest, client)?;
        }
        if wants("resyncs") {
            self.resyncs(guest, figures)?;
        }
        if wants("faults") {
            self.faults(guest, figures)?;
        }
        guest.steps(&format!("{}_down", self.steps)).map(drop)
    }

    fn loads(&self, guest: &Guest, figures: &mut Figures) -> Result<()> {
        for load in &loads::LOADS {
            let rate = loads::run(guest, self.device, load).context(load.name)?;
            step(NAME, &format!("{}: {}: {rate:.0}", self.name, load.name));
            figures.rate(load.name, self.name, rate);
        }
        Ok(())
    }

    fn faults(&self, guest: &Guest, figures: &mut Figures) -> Result<()> {
        for (row, words) in self.words {
            figures.words(*row, self.name, words);
        }
        for fault in self.faults {
            let seen = self.fault(guest, fault).with_context(|| fault.row.name())?;
            step(NAME, &format!("{}: {}: {seen:?}", self.name, fault.row.name()));
            figures.seen(fault.row, self.name, seen);
        }
        if let Some(hand_over) = self.hands_over {
            figures.gap(Row::Moved, self.name, seconds(&guest.steps(hand_over)?)?);
        }
        Ok(())
    }

    fn fault(&self, guest: &Guest, fault: &Fault) -> Result<Seen> {
        let Fault { before, during: (during, after_it), after, .. } = fault;
        let said = guest
            .steps(&format!("{before}\nwatched {} {after_it} {during}\n{{ {after}; }} >&2", self.device))?;
        serde_json::from_str(&said).with_context(|| format!("what the writer saw: {said}"))
    }

    fn resyncs(&self, guest: &Guest, figures: &mut Figures) -> Result<()> {
        for (how, args) in self.resyncs {
            for mib in &guest.options.changed_mib {
                let time = seconds(&guest.steps(&format!("{}_resync {mib} {args}", self.steps))?)?;
                step(NAME, &format!("{} {how}: {mib} MiB in {time:.2} s", self.name));
                figures.resync(*mib, self.name, how, time);
            }
        }
        Ok(())
    }
}

/// Microseconds that a step has told.
fn seconds(said: &str) -> Result<f64> {
    let us: f64 = said.trim().parse().with_context(|| format!("microseconds: {said:?}"))?;
    Ok(us / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm_compare::GUEST;

    /// A name that was mistyped would show minutes into a run only.
    #[test]
    fn every_step_is_one_of_the_machine() {
        let known = |step: &str| GUEST.lines().any(|line| line.starts_with(&format!("{step}() {{")));
        for system in &SYSTEMS {
            let resync = if system.resyncs.is_empty() { &[][..] } else { &["resync"] };
            for step in ["up", "down"].iter().chain(resync) {
                assert!(known(&format!("{}_{step}", system.steps)), "{} cannot {step}", system.name);
            }
            let ends = system.client.map(|client| format!("{client}_ends"));
            for step in system.client.into_iter().chain(ends.as_deref()) {
                assert!(known(step), "{}: no step {step}", system.name);
            }
            let words =
                system.faults.iter().flat_map(|f| [f.before, f.during.0, f.after]).chain(system.hands_over);
            let names = words.flat_map(|text| text.split(|c: char| !c.is_alphanumeric() && c != '_'));
            for name in names.filter(|name| name.starts_with(&format!("{}_", system.steps))) {
                assert!(known(name), "{}: no step {name}", system.name);
            }
        }
    }
}
