//! The synchronisation primitives of what is model-checked (see `tests/models.rs`).

pub(crate) use std::sync::atomic::{AtomicU8, Ordering};
