//! A model of the data path that a machine checks to its end: one block in one region, on two or three data
//! nodes, with volatile caches, intents, dirty bitmaps on every replica, ack sets, joins, removals, promotions
//! and resync. Checked in every state: invariants 1, 3, 4 and 6 of the design; and that every run ends with a
//! volume that serves, in sync, equal everywhere.
//!
//! It never runs production code and decides nothing for it. `action.rs` names, for each step, the function of
//! production that the step stands for; whoever changes one looks at the other.
//!
//! | file | concern |
//! |---|---|
//! | `state` | what is where |
//! | `action` | the steps, and the rules that can be left out |
//! | `step` | what each step does |
//! | `settle` | what follows at once, and the invariants |
//! | `tests` | the bounds, run by stateright |
//!
//! The model's own test is that it fails without each of R3, R4, R5, R6, R8, R9, R10, R11, R12 and R14.
//!
//! What is taken as one step, and why no run is lost by it:
//! - *Intent durable, block written, answer counted.* A crash before it finds nothing done, one after it
//!   everything. An intent without its write only marks more. An answer on its way changes nothing at its
//!   sender; that the primary acts before it has it is the same as the block being written later.
//! - *A message and its effect.* Sessions keep their order and what a message says was fixed when it was sent,
//!   so an effect depends on what its receiver knows alone. A write carries the missing and the epoch of when
//!   it started; the config that went out before it on the session is heard first.
//! - *An intent cleared in memory and on the disk*: in between, the disk says more. Its bitmaps are saved in a
//!   step of their own before.
//! - *A start and its registration.* Until it registers, the cluster knows the run before.
//! - *A promotion and the end of the old primary's lease* [R1]: `control/model` shows the one from the other.
//! - Bits of dirty bitmaps reach the disk only where something waits for it, clears at once: late sets and
//!   early clears are what leaves the least on the disk.
//!
//! Promised is that an acknowledged write survives a single failure, a flushed one all. So if every member has
//! failed and power was lost among them, what no flush covered may be gone (`settle.rs::excuse`). A set of one is
//! no such case.
//!
//! Not here: moves, forces, disk errors, partial blocks, several blocks (the random schedules of
//! `replica/testing` and the simulator have them), and a follower that is two configs behind on a session that
//! works.

mod action;
mod settle;
mod state;
mod step;
mod tests;
