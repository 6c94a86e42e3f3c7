//! The host daemon as a library: what exists on a host, and the monitors that run it.
//!
//! | module | subject |
//! | --- | --- |
//! | [`inventory`] | what exists, in SQLite; the binding of each disk |
//! | `storage` | datastores and images as files |
//! | `net` | tap devices |
//! | `monitor` | a monitor's process and control socket |
//! | [`Host`] (`daemon`) | the operations: create, start, stop, migrate, recover |
//! | [`server`], `rest` | the API over HTTP on a unix socket |
//!
//! A request comes in `rest`, runs as a plain blocking function of [`Host`] on a thread of the
//! runtime's blocking pool, and talks to the inventory and, through `monitor`, to the VM's
//! monitor. What a monitor says unasked is handled by one supervisor thread for each VM
//! (`daemon::supervise`).
//!
//! The daemon may be killed at any instant: what it has to know afterwards is in the inventory
//! before it acts, and `daemon::recover` goes on from there.

mod config;
mod crash;
mod daemon;
pub mod inventory;
mod listen;
mod lock;
mod monitor;
mod net;
pub mod observations;
mod rest;
pub mod server;
mod storage;

pub use config::HostConfig;
pub use crash::CRASH_POINTS;
pub use daemon::{Host, Images, Intent};
pub use monitor::packet;
pub use storage::identity::{FileIdentity, Stamp};
pub use storage::location::{Binding, Location};
