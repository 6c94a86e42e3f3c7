//! The part of the NBD protocol that Strake speaks.
//!
//! * [`protocol`]: bytes to values and back, pure;
//! * [`Server`] serves [`Export`]s, above all [`LiveExport`]: a live disk, whose image can be
//!   migrated while clients use it;
//! * [`NbdImage`] is an export of a server as an image of `strake_block`: what a live disk or a
//!   migration can use as any other image;
//! * [`Uri`] names an export; [`TlsServer`] and [`TlsClient`] encrypt.
//!
//! Both sides are one thread per connection around a channel that never blocks.

mod channel;
pub mod client;
mod export;
mod memory;
mod observations;
pub mod protocol;
pub mod server;
mod socket;
mod sync;
mod tls;
mod uri;

pub use client::NbdImage;
pub use export::{Access, Export, ExportQueue, LiveExport};
pub use observations::*;
pub use server::{Listener, Server, ServerConfig};
pub use socket::Socket;
pub use tls::{Identity, TlsClient, TlsServer};
pub use uri::{Address, DEFAULT_PORT, Security, Uri};
