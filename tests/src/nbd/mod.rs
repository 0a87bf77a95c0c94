//! A second NBD client, for tests of the server only: it says what a test tells it to, right or wrong, and
//! judges every reply by the rules of the specification.
//!
//! Written from the specification's text, not from `nbd-server`, with which it shares no line: an error of the
//! server's codec is not repeated here. It never retries, reconnects or corrects anything.

mod load;
mod model;
mod options;
mod random_options;
mod session;
pub mod spec;
mod wire;

pub use load::{Load, Outcome};
pub use options::{Export, OptionReply, Talk, export_data, meta_data, option_bytes};
pub use random_options::negotiate;
pub use session::{Form, Reply, Request, Session};
pub use wire::{Address, Wire};
