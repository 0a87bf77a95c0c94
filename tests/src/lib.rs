//! Harness of the process tests: clusters of real `blkrepl` processes, faults, verifying clients.
//!
//! What is here is used by `tests/tests/*.rs` and by the benches. It drives the binary only through
//! what design section 9 promises to tools: the command line, `cluster.json`, `status --json`, NBD.
//! It knows nothing of the inside of a node, never repairs what it observes, and ends no process but
//! those that it started itself or that the cluster's own `cluster.json` names.

pub mod binary;
pub mod bits;
pub mod client;
pub mod cluster;
pub mod counters;
pub mod disk;
pub mod evidence;
pub mod faults;
pub mod features;
pub mod files;
pub mod guest;
pub mod ledger;
pub mod mapped;
pub mod mount;
pub mod nbd;
pub mod netns;
pub mod plan;
pub mod postgres;
pub mod proc;
pub mod proxy;
pub mod report;
pub mod scenario;
pub mod status;
pub mod usage;
pub mod verify;
pub mod vm;
pub mod vm_compare;
pub mod wait;

pub use cluster::{Cluster, ClusterOptions};
pub use scenario::{scenario, with_cluster};
