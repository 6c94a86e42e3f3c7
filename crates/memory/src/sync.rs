//! The synchronisation primitives of the parts that are model-checked: `pager/table.rs` takes its
//! atomics from `crate::sync` alone, so that `tests/models.rs` can compile the same file against
//! shuttle's.

pub(crate) use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
