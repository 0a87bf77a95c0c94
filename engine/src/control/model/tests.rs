//! Runs the model of the control plane to its bounds, and without parts of it.

use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::state::State;
use super::step::{Action, Bounds, Without};

/// Nothing happens but renewals and time.
const NONE: Bounds = Bounds {
    crashes: 0,
    elections: 0,
    removals: 0,
    promotions: 0,
    renewals: 1,
    tick: Duration::from_millis(1500),
    without: None,
};

const INVARIANTS: &str = "no invariant is broken";
const SERVES_AGAIN: &str = "the volume serves again after the last fault";

#[derive(Clone)]
struct ControlPlane(Bounds);

impl Model for ControlPlane {
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
        vec![
            Property::<Self>::always(INVARIANTS, |_, s: &State| s.broken.is_none()),
            Property::<Self>::always(SERVES_AGAIN, |m: &Self, s| {
                !s.last_fault || m.0.serves_after(s).is_some()
            }),
        ]
    }
}

fn exhaust(name: &str, bounds: Bounds) {
    let began = Instant::now();
    let checker = ControlPlane(bounds).checker().threads(2).finish_when(HasDiscoveries::AnyFailures);
    let checker = checker.spawn_dfs().join();
    println!(
        "MODEL control plane, {name}: {} states, {} steps, longest run {}, {:.1} s; {bounds:?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64()
    );
    if checker.discoveries().is_empty() {
        return;
    }
    let checker = ControlPlane(bounds).checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = checker.discoveries().into_iter().next();
    let (what, path) = found.expect("breadth first finds what depth first found");
    let last = path.last_state().clone();
    for action in path.into_actions() {
        println!("  {action:?}");
    }
    panic!("not so: {what}: {:?} in {last:#?}", last.broken);
}

#[test]
fn model_of_the_control_plane_in_small() {
    exhaust("in small", Bounds { elections: 1, ..NONE });
    exhaust("in small", Bounds { promotions: 1, ..NONE });
}

#[test]
#[ignore = "many states: step `models` of tests/run"]
fn model_of_the_control_plane_with_a_crash() {
    exhaust("a crash", Bounds { crashes: 1, promotions: 1, ..NONE });
}

#[test]
#[ignore = "many states: step `models` of tests/run"]
fn model_of_the_control_plane_with_two_leaders() {
    exhaust("two leaders", Bounds { elections: 1, promotions: 1, ..NONE });
    exhaust("a removal", Bounds { removals: 1, promotions: 1, ..NONE });
}

/// Bounds for which there is no time in each run.
fn exhaust_wide(name: &str, bounds: Bounds) {
    if std::env::var("BLKREPL_MODEL").as_deref() != Ok("wide") {
        return println!("set BLKREPL_MODEL=wide for the wide bounds");
    }
    exhaust(name, bounds);
}

#[test]
#[ignore = "many states: step `models` of tests/run"]
fn model_of_the_control_plane_with_two_crashes() {
    exhaust_wide("two crashes", Bounds { crashes: 2, ..NONE });
}

#[test]
#[ignore = "many states: step `models` of tests/run"]
fn model_of_the_control_plane_with_a_crash_and_two_leaders() {
    exhaust_wide("a crash and two leaders", Bounds { crashes: 1, elections: 1, ..NONE });
}

#[test]
#[ignore = "many states: step `models` of tests/run"]
fn model_of_the_control_plane_with_two_leaders_and_a_removal() {
    exhaust_wide("two leaders and a removal", Bounds { elections: 1, removals: 1, ..NONE });
}

#[test]
#[ignore = "many states: step `models` of tests/run"]
fn model_of_the_control_plane_fails_without_each_part() {
    use Without as W;
    let quiet = Bounds { promotions: 1, ..NONE };
    let elects = Bounds { elections: 1, ..quiet };
    let parts = [
        (W::Confirm, elects),
        (W::Exclude, quiet),
        (W::Index, quiet),
        (W::FromSending, quiet),
        (W::Quiet, elects),
        (W::AckSet, Bounds { removals: 1, ..NONE }),
    ];
    let mut survivors = Vec::new();
    for (part, bounds) in parts {
        let model = ControlPlane(Bounds { without: Some(part), ..bounds });
        let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let states = checker.unique_state_count();
        let Some(path) = checker.discovery(INVARIANTS) else {
            println!("MODEL without {part:?}: nothing broke in {states} states");
            survivors.push(part);
            continue;
        };
        let broken = path.last_state().broken;
        let steps = path.into_actions().len();
        println!("MODEL without {part:?}: {broken:?} after {steps} steps ({states} states)");
    }
    assert!(survivors.is_empty(), "nothing broke without {survivors:?}");
}
