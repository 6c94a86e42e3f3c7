//! The synchronisation primitives of what is model-checked: `client/outbox.rs` takes its lock from
//! here, so that `tests/models.rs` can compile the same file against shuttle's.

pub(crate) use std::sync::{Mutex, MutexGuard};
