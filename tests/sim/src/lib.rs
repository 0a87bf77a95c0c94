//! A deterministic simulator of a whole blkrepl cluster.
//!
//! It runs the production replication core (`blkrepl_engine::replica`) of two or three data nodes, the
//! production state machine, leases and failover controller of the control plane, and several clients, in
//! one thread on virtual time. One seed decides everything: sizes, latencies, what the clients ask, which
//! faults strike and when. The same seed gives the same run, to the byte of its trace.
//!
//! ```
//! use blkrepl_sim::{Options, run};
//! let outcome = run(1, &Options { ops: 100, ..Options::default() });
//! assert!(outcome.is_clean(), "{:?}", outcome.violation);
//! assert_eq!(outcome.hash, run(1, &Options { ops: 100, ..Options::default() }).hash);
//! ```
//!
//! What is modelled and what is not: docs/testing.md.

mod checks;
mod client;
mod clock;
mod content;
mod control;
mod disk;
mod drive;
mod fault;
mod faults;
mod history;
pub mod lockstep;
mod minimise;
mod net;
mod node;
mod operator;
mod options;
mod outcome;
mod peers;
mod rng;
mod runner;
mod stages;
mod storage;
mod trace;
mod world;

pub use fault::{FaultKind, FaultSet};
pub use minimise::minimise;
pub use options::{OPS_DEFAULT, Options, Scenario};
pub use outcome::{COVERAGE_KNOWN, Invariant, Outcome, Stats, Violation};
pub use runner::{run, run_lockstep};
