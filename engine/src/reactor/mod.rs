//! reactor

pub mod client;
