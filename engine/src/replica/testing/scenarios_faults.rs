//! Scenarios with faults.
