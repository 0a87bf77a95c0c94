//! Tests on real rings.
