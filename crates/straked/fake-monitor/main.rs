//! Stands in for `strake-vmm` in tests.
fn main() {}
