//! One run from a seed to its outcome. A panic of the production code is a violation like any other: it is
//! caught here, with its place.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::options::Options;
use crate::outcome::{Invariant, Outcome};
use crate::world::World;

thread_local! {
    /// Set while a simulation runs on this thread; takes what a panic says.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps panics within a simulation from being printed; others are as before.
fn catch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let caught = PANIC.with(|panic| {
                let mut panic = panic.borrow_mut();
                if let Some(text) = panic.as_mut() {
                    *text = info.to_string();
                }
                panic.is_some()
            });
            if !caught {
                before(info);
            }
        }));
    });
}

/// Runs one seed.
#[must_use]
pub fn run(seed: u64, options: &Options) -> Outcome {
    simulate(|| World::new(seed, options))
}

/// Runs one seed with the production control plane, Raft and all, in lockstep.
#[must_use]
pub fn run_lockstep(seed: u64, options: &Options) -> Outcome {
    simulate(|| World::lockstep(seed, options))
}

/// Runs a world to its end.
pub(crate) fn simulate(make: impl FnOnce() -> World) -> Outcome {
    catch_panics();
    PANIC.with(|panic| *panic.borrow_mut() = Some(String::new()));
    let mut world = make();
    let ran = catch_unwind(AssertUnwindSafe(|| world.run()));
    let text = PANIC.with(|panic| panic.borrow_mut().take()).unwrap_or_default();
    if ran.is_err() {
        world.broke(Invariant::Panic, text);
    }
    let outcome = world.outcome();
    if ran.is_err() {
        // What a panic left half done is not taken apart: that could panic again.
        std::mem::forget(world);
    }
    outcome
}
