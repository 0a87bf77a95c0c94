//! A seeded simulator of a whole cluster around the code that production runs. One seed decides everything: it
//! reads no clock, no system randomness, and starts no thread.

#![forbid(unsafe_code)]

mod clock;
mod rng;

pub mod lockstep;
