//! Runs the model of the data path to its bounds, and without each rule.
//!
//! `BLKREPL_MODEL=wide` checks wider bounds as well, for which there is no time in each run.

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::action::{Action, Without};
use super::state::{Broken, Phase, Proposal, State, bit};
use super::step::Bounds;

/// Two data nodes.
const TWO: Bounds = Bounds {
    nodes: 2,
    writes: 2,
    powers: 2,
    kills: 1,
    removals: 1,
    lapses: 1,
    without: None,
    visible_only: false,
};

/// Three data nodes.
const THREE: Bounds = Bounds { nodes: 3, writes: 1, powers: 1, kills: 0, removals: 2, lapses: 0, ..TWO };

const INVARIANTS: &str = "no invariant is broken";
const ENDS_WELL: &str = "where nothing more happens, the volume serves, in sync and equal everywhere";

#[derive(Clone)]
struct DataPath(Bounds);

impl Model for DataPath {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.0.initial()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.0.candidates(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.0.next(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties =
            vec![Property::<Self>::always(INVARIANTS, |_, s: &State| s.world.broken.is_none())];
        if self.0.without.is_none() {
            properties.push(Property::<Self>::always(ENDS_WELL, |m, s| m.ends_well(s)));
        }
        properties
    }
}

impl DataPath {
    /// Every step uses something up, so each run ends; where it does, all is well (invariants 6 and 10).
    fn ends_well(&self, s: &State) -> bool {
        let busy = |n: u8| {
            let node = s.node(n);
            let behind = node.config.epoch != s.committed.epoch || node.proposal != Proposal::None;
            !node.up || behind || node.primary.write.id > 0
        };
        if (0..self.0.nodes).any(busy) {
            return true;
        }
        let mut actions = Vec::new();
        self.0.candidates(s, &mut actions);
        if actions.iter().any(|a| self.0.next(s, *a).is_some()) {
            return true;
        }
        let primary = s.node(s.committed.primary);
        let well = |n: u8| s.alive(&s.committed, n) && s.node(n).data == primary.data && !s.node(n).intent;
        (0..self.0.nodes).all(well)
            && s.committed.members() == bit(self.0.nodes) - 1
            && primary.primary.phase == Phase::Serving
    }
}

/// Looks at every state within the bounds.
fn exhaust(name: &str, bounds: Bounds) {
    let began = Instant::now();
    let checker = DataPath(bounds).checker().threads(2).finish_when(HasDiscoveries::AnyFailures);
    let checker = checker.spawn_dfs().join();
    println!(
        "MODEL data path, {name}: {} states, {} steps, longest run {}, {:.1} s; {bounds:?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64()
    );
    if checker.discoveries().is_empty() {
        return;
    }
    let checker = DataPath(bounds).checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = checker.discoveries().into_iter().next();
    let (what, path) = found.expect("breadth first finds what depth first found");
    let last = *path.last_state();
    for action in path.into_actions() {
        println!("  {action:?}");
    }
    panic!("not so: {what}: {:?} in {last:#?}", last.world.broken);
}

/// The shortest run that breaks an invariant without a rule.
fn break_without(rule: Without, visible_only: bool) -> Option<(Broken, Vec<Action>, usize)> {
    let bounds = match rule {
        Without::R12Receiver | Without::R12Join => THREE,
        _ => TWO,
    };
    let model = DataPath(Bounds { without: Some(rule), visible_only, ..bounds });
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let path = checker.discovery(INVARIANTS)?;
    let broken = path.last_state().world.broken?;
    Some((broken, path.into_actions(), checker.unique_state_count()))
}

#[test]
fn model_of_the_data_path_in_small() {
    exhaust("in small", Bounds { writes: 1, powers: 1, removals: 0, ..TWO });
}

#[test]
#[ignore = "millions of states: step `models` of tests/run"]
fn model_of_the_data_path_with_two_nodes() {
    exhaust("two nodes", TWO);
}

#[test]
#[ignore = "millions of states: step `models` of tests/run"]
fn model_of_the_data_path_with_three_nodes() {
    exhaust("three nodes", THREE);
}

#[test]
#[ignore = "millions of states: step `models` of tests/run"]
fn model_of_the_data_path_in_wide_bounds() {
    if std::env::var("BLKREPL_MODEL").as_deref() != Ok("wide") {
        return println!("set BLKREPL_MODEL=wide for the wide bounds");
    }
    exhaust("two nodes, wide", Bounds { writes: 3, powers: 2, kills: 2, removals: 2, lapses: 2, ..TWO });
    exhaust("three nodes, wide", Bounds { powers: 1, kills: 1, removals: 2, lapses: 1, ..THREE });
}

#[test]
#[ignore = "millions of states: step `models` of tests/run"]
fn model_of_the_data_path_fails_without_each_rule() {
    use Without as W;
    let rules = [
        W::R3,
        W::R4Entering,
        W::R4Flush,
        W::R4Set,
        W::R5Flush,
        W::R5Bitmaps,
        W::R5Outside,
        W::R6,
        W::R8,
        W::R9Flush,
        W::R9Promotion,
        W::R10,
        W::R11,
        W::R12Receiver,
        W::R12Removal,
        W::R12Join,
        W::R14,
    ];
    let mut survivors = Vec::new();
    for rule in rules {
        for visible_only in [false, true] {
            let to = if visible_only { "what clients can see" } else { "any invariant" };
            match break_without(rule, visible_only) {
                Some((broken, run, states)) => {
                    let steps = run.len();
                    println!(
                        "MODEL without {rule:?}: {broken:?} after {steps} steps ({to}; {states} states)"
                    );
                }
                None => survivors.push((rule, to)),
            }
        }
    }
    assert!(survivors.is_empty(), "nothing broke without {survivors:?}");
}
