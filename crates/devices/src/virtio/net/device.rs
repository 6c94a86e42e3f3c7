//! What the guest sees of an interface.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use strake_observe::{Because, Result};
use strake_state::Records;
use strake_state::observations::ShapeDiffers;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::tap::{NetBackend, Offloads, Tap};
use super::worker::NetWork;
use crate::observations::TapFailed;
use crate::virtio::{Activation, ConfigSignal, Kind, VirtioDevice, Work, feature, read_bytes};

/// Chains per queue.
pub const QUEUE_SIZE: u16 = 256;

const RX: usize = 0;
const TX: usize = 1;

/// Whether the cable is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Packets pass.
    Up,
    /// Packets are dropped in both directions, and the guest is told.
    Down,
}

/// What passed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct NetCounters {
    /// Packets to the guest.
    pub received: u64,
    /// Packets from the guest.
    pub sent: u64,
    /// Packets of either direction that were dropped.
    pub dropped: u64,
}

/// What the device and its worker share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) down: AtomicBool,
    pub(super) received: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) dropped: AtomicU64,
}

strake_state::saved! {
    /// What the guest sees of an interface.
    pub record SavedNet("virtio-net", version 1) {
        /// Its MAC address.
        1 => mac: [u8; 6],
        /// Whether the cable is out.
        2 => down: bool,
    }
}

/// A network interface.
#[derive(Debug)]
pub struct VirtioNet {
    name: String,
    backend: Arc<dyn NetBackend>,
    mac: [u8; 6],
    shared: Arc<Shared>,
    signal: OnceLock<ConfigSignal>,
}

impl VirtioNet {
    /// An interface named `name` on a tap that was opened with `IFF_NO_PI` and `IFF_VNET_HDR`.
    ///
    /// # Errors
    /// The descriptor is no such tap.
    pub fn new(name: impl Into<String>, tap: OwnedFd, mac: [u8; 6]) -> Result<Self> {
        let name = name.into();
        let tap = Tap::new(&name, tap)?;
        Ok(Self::over(name, Arc::new(tap), mac))
    }

    /// An interface on any backend.
    #[must_use]
    pub fn over(name: impl Into<String>, backend: Arc<dyn NetBackend>, mac: [u8; 6]) -> Self {
        Self {
            name: name.into(),
            backend,
            mac,
            shared: Arc::default(),
            signal: OnceLock::new(),
        }
    }

    /// Pulls or plugs the cable.
    pub fn set_link(&self, link: Link) {
        self.shared
            .down
            .store(link == Link::Down, Ordering::Release);
        if let Some(signal) = self.signal.get() {
            signal.changed();
        }
    }

    /// What passed since the start.
    #[must_use]
    pub fn counters(&self) -> NetCounters {
        NetCounters {
            received: self.shared.received.load(Ordering::Relaxed),
            sent: self.shared.sent.load(Ordering::Relaxed),
            dropped: self.shared.dropped.load(Ordering::Relaxed),
        }
    }
}

/// What the tap may hand to a driver with these features.
fn offloads(features: u64) -> Offloads {
    [
        (VIRTIO_NET_F_GUEST_CSUM, Offloads::CHECKSUM),
        (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
        (VIRTIO_NET_F_GUEST_ECN, Offloads::TSO_ECN),
    ]
    .into_iter()
    .filter(|(number, _)| features & feature(*number) != 0)
    .fold(Offloads::default(), |all, (_, one)| all.with(one))
}

impl VirtioDevice for VirtioNet {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> Kind {
        Kind {
            id: 1,
            class: 0x02_00_00, // Ethernet
        }
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
        ]
        .into_iter()
        .fold(0, |all, number| all | feature(number))
    }

    /// The standard's section 5.1.3.1: segmentation needs checksums, ECN needs segmentation.
    fn accepts(&self, features: u64) -> bool {
        let has = |number| features & feature(number) != 0;
        let needs = |one, any_of: &[u32]| !has(one) || any_of.iter().any(|other| has(*other));
        needs(VIRTIO_NET_F_GUEST_TSO4, &[VIRTIO_NET_F_GUEST_CSUM])
            && needs(VIRTIO_NET_F_GUEST_TSO6, &[VIRTIO_NET_F_GUEST_CSUM])
            && needs(
                VIRTIO_NET_F_GUEST_ECN,
                &[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6],
            )
            && needs(VIRTIO_NET_F_HOST_TSO4, &[VIRTIO_NET_F_CSUM])
            && needs(VIRTIO_NET_F_HOST_TSO6, &[VIRTIO_NET_F_CSUM])
            && needs(
                VIRTIO_NET_F_HOST_ECN,
                &[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6],
            )
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 8];
        let (mac, status) = config.split_at_mut(6);
        mac.copy_from_slice(&self.mac);
        if !self.shared.down.load(Ordering::Acquire) {
            let up = u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1);
            status.copy_from_slice(&up.to_le_bytes());
        }
        read_bytes(&config, offset, data);
    }

    fn write_config(&self, _: usize, _: &[u8]) {
        // With virtio 1 nothing of it is the driver's.
    }

    fn connect(&self, signal: ConfigSignal) {
        let _ = self.signal.set(signal);
    }

    fn activate(&self, mut activation: Activation) -> Result<Vec<Box<dyn Work>>> {
        self.backend
            .set_offloads(offloads(activation.features))
            .because_of(|| TapFailed {
                device: self.name.clone(),
                doing: "setting what the guest can receive".to_owned(),
            })?;
        let mergeable = activation.features & feature(VIRTIO_NET_F_MRG_RXBUF) != 0;
        let rx = activation.take(RX);
        let tx = activation.take(TX);
        Ok(vec![Box::new(NetWork::new(
            self.name.clone(),
            Arc::clone(&self.backend),
            Arc::clone(&self.shared),
            activation.memory,
            rx,
            tx,
            mergeable,
        ))])
    }

    fn reset(&self) {
        // Nobody receives now; the next driver says anew what it can take.
    }

    fn prepare(&self, _: &[u16]) -> Result<()> {
        Ok(()) // Its worker is all that it needs.
    }

    fn save(&self, records: &mut Records) -> Result<()> {
        records.put(
            &self.name,
            &SavedNet {
                mac: self.mac,
                down: self.shared.down.load(Ordering::Acquire),
            },
        )
    }

    fn restore(&self, records: &mut Records) -> Result<()> {
        let saved: SavedNet = records.take(&self.name)?;
        if saved.mac != self.mac {
            return Err(ShapeDiffers {
                component: self.name.clone(),
                what: "the MAC address".to_owned(),
                saved: format!("{:02x?}", saved.mac),
                found: format!("{:02x?}", self.mac),
            }
            .into());
        }
        self.shared.down.store(saved.down, Ordering::Release);
        Ok(())
    }
}
