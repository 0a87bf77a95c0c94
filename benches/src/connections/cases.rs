//! What `connections` measures. Cases of one group stand together in the table, and are compared to its first.

use blkrepl_nbd::bench::Job;
use blkrepl_tests::proc::missing;

use crate::scale::bed::WRITES;

/// Requests in flight in all, where that is the same for every number of connections.
const TOTAL: usize = 32;
/// Requests in flight on each connection, where that is the same.
const EACH: usize = 8;
const CONNECTIONS: [usize; 3] = [1, 2, 4];
/// Connections of nbdcopy.
const COPY_CONNECTIONS: [usize; 2] = [1, 4];
/// Requests in flight on the volume that is measured, in the part `volumes`.
const DEPTHS: [usize; 2] = [1, 8];
/// Requests in flight of the other load there.
const OTHER_DEPTHS: [usize; 2] = [8, 32];
const READS: Job = Job { read_percent: 100, ..WRITES };

/// A part of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Connections,
    Nbdcopy,
    Volumes,
}

/// Which way nbdcopy copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From a file into the volume, flushed.
    In,
    /// Out of the volume, thrown away.
    Out,
}

/// On which volume the other load is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    Second,
    /// On the one that is measured.
    Same,
}

/// One kind of run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// The load generator.
    Load { job: Job, connections: usize, depth: usize },
    /// nbdcopy.
    Copy { way: Way, connections: usize },
    /// The load generator with one connection, while another one is at work.
    Beside { depth: usize, other: Where, other_depth: usize },
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) group: String,
    pub(super) name: String,
    pub(super) what: What,
}

impl Part {
    pub(super) const ALL: [Self; 3] = [Self::Connections, Self::Nbdcopy, Self::Volumes];

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Nbdcopy => "nbdcopy",
            Self::Volumes => "volumes",
        }
    }

    /// Why it cannot be measured here, if so.
    pub(super) fn missing(self) -> Option<String> {
        if self == Self::Nbdcopy { missing(&["nbdcopy"]) } else { None }
    }

    pub(super) fn cases(self) -> Vec<Case> {
        match self {
            Self::Connections => [("writes", WRITES), ("reads", READS)]
                .into_iter()
                .flat_map(|(word, job)| [same_total(word, job), same_each(word, job)])
                .flatten()
                .collect(),
            Self::Nbdcopy => [copies("in, flushed", Way::In), copies("out", Way::Out)].concat(),
            Self::Volumes => DEPTHS.into_iter().flat_map(beside).collect(),
        }
    }
}

fn same_total(word: &str, job: Job) -> Vec<Case> {
    let group = format!("4 KiB random {word}, {TOTAL} in flight in all");
    CONNECTIONS.into_iter().map(|n| load(&group, job, n, TOTAL / n)).collect()
}

fn same_each(word: &str, job: Job) -> Vec<Case> {
    let group = format!("4 KiB random {word}, {EACH} in flight on each connection");
    CONNECTIONS.into_iter().map(|n| load(&group, job, n, EACH)).collect()
}

fn load(group: &str, job: Job, connections: usize, depth: usize) -> Case {
    let name = format!("{} x {depth}", shown(connections));
    Case { group: group.to_owned(), name, what: What::Load { job, connections, depth } }
}

fn copies(word: &str, way: Way) -> Vec<Case> {
    let case = |connections| Case {
        group: format!("nbdcopy {word}"),
        name: shown(connections),
        what: What::Copy { way, connections },
    };
    COPY_CONNECTIONS.into_iter().map(case).collect()
}

fn beside(depth: usize) -> Vec<Case> {
    let case = |name: String, what| Case {
        group: format!("4 KiB random writes, {depth} in flight on one volume"),
        name,
        what,
    };
    let alone = case("alone".to_owned(), What::Load { job: WRITES, connections: 1, depth });
    let others = OTHER_DEPTHS.into_iter().flat_map(|other_depth| {
        [(Where::Second, "on the other"), (Where::Same, "more on it")].map(|(other, word)| {
            case(format!("{other_depth} {word}"), What::Beside { depth, other, other_depth })
        })
    });
    std::iter::once(alone).chain(others).collect()
}

fn shown(connections: usize) -> String {
    let plural = if connections == 1 { "" } else { "s" };
    format!("{connections} connection{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_each_group_is_what_the_others_are_compared_to() {
        let cases: Vec<Case> = Part::ALL.into_iter().flat_map(Part::cases).collect();
        for group in cases.chunk_by(|a, b| a.group == b.group) {
            let first = match group[0].what {
                What::Load { connections, .. } | What::Copy { connections, .. } => connections == 1,
                What::Beside { .. } => false,
            };
            assert!(first && group.len() > 1, "{group:?}");
        }
        let groups: std::collections::BTreeSet<_> = cases.iter().map(|case| &case.group).collect();
        assert_eq!(groups.len(), cases.chunk_by(|a, b| a.group == b.group).count(), "a group in two pieces");
    }
}
