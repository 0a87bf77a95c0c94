//! Harness of the process tests: clusters of real `blkrepl` processes, faults, verifying clients.
