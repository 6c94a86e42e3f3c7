//! The synchronisation primitives of the parts that are model-checked.
//!
//! `bitmap.rs`, `live/gate.rs`, `live/zones.rs` and `live/claims.rs` take their atomics and locks from `crate::sync` alone, so that
//! `tests/models.rs` can compile the same files against shuttle's primitives.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
