//! A front-end with a guest of its own: 4 MiB of memory in a memfd, mapped twice, as in life.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{Access, FaultImage, Image, LiveDisk, RawImage};
use strake_memory::{GuestMemory, GuestRam, create_memfd};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::VhostUserServer;
use super::super::session::PROTOCOL_FEATURES;
use crate::lifecycle::Component;
use crate::testing::{Piece, Ring};
use crate::virtio::blk::{BlkConfig, VirtioBlk};

pub(super) const SECTORS: u64 = 16 * 1024;
const RAM: u64 = 4 << 20;
/// What the front-end says its own addresses are: nobody follows them.
pub(super) const THEIRS: u64 = 0x7f00_0000_0000;
pub(super) const DATA: u64 = 0x30_0000;
const HEADERS: u64 = 0x20_0000;
const STATUSES: u64 = 0x2f_0000;

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

/// A disk that is served.
pub(super) struct Served {
    pub(super) server: VhostUserServer,
    pub(super) faults: Arc<FaultImage>,
    pub(super) file: tempfile::NamedTempFile,
    dir: tempfile::TempDir,
}

pub(super) fn serve(queues: u16) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    let open = File::options()
        .read(true)
        .write(true)
        .open(file.path())
        .unwrap();
    let raw = RawImage::from_fd(open.into(), "disk.raw", Access::ReadWrite).unwrap();
    let faults = FaultImage::new(Arc::new(raw));
    let image: Arc<dyn Image> = faults.clone();
    let config = BlkConfig {
        queues,
        serial: "serial-1".into(),
        read_only: false,
    };
    let device = VirtioBlk::new("export-root", LiveDisk::new("root", image), &config).unwrap();
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let server = VhostUserServer::new(Arc::new(device), OwnedFd::from(listener)).unwrap();
    server.start().unwrap();
    Served {
        server,
        faults,
        file,
        dir,
    }
}

impl Served {
    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

/// A guest that outlives its connections.
pub(super) struct Guest {
    memfd: OwnedFd,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) rings: Vec<Ring>,
    pub(super) kicks: Vec<EventFd>,
    pub(super) calls: Vec<EventFd>,
    pub(super) errors: Vec<EventFd>,
    size: u16,
}

impl Guest {
    pub(super) fn new(queues: u16, size: u16) -> Self {
        let memfd = create_memfd("front-end", RAM).unwrap();
        let ram = GuestRam::map(memfd.try_clone().unwrap(), RAM).unwrap();
        let memory = ram.ram().memory().into_inner();
        let events = || {
            (0..queues)
                .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
                .collect()
        };
        Self {
            rings: (0..queues)
                .map(|index| {
                    let base = 0x10_0000 + u64::from(index) * Ring::BYTES;
                    Ring::new(Arc::clone(&memory), base, size, false)
                })
                .collect(),
            memfd,
            memory,
            kicks: events(),
            calls: events(),
            errors: events(),
            size,
        }
    }

    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM,
            userspace_addr: THEIRS,
            mmap_offset: 0,
            mmap_handle: self.memfd.as_raw_fd(),
        }
    }

    /// Connects and agrees on features, no further.
    pub(super) fn connect(&self, served: &Served) -> Frontend {
        let mut front_end = Frontend::connect(served.socket(), self.rings.len() as u64).unwrap();
        front_end.set_owner().unwrap();
        let features = front_end.get_features().unwrap();
        // Not the event index: the test rings do without here.
        front_end
            .set_features(features & !crate::virtio::EVENT_IDX)
            .unwrap();
        assert!(features & PROTOCOL_FEATURES != 0);
        let offered = front_end.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        front_end.set_protocol_features(offered).unwrap();
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front_end
    }

    /// Connects and lets the rings run; those that ran before go on at `bases`.
    pub(super) fn attach(&self, served: &Served, bases: &[u16]) -> Frontend {
        let mut front_end = self.connect(served);
        front_end.set_mem_table(&[self.region()]).unwrap();
        self.run(&mut front_end, bases);
        front_end
    }

    pub(super) fn run(&self, front_end: &mut Frontend, bases: &[u16]) {
        for (index, ring) in self.rings.iter().enumerate() {
            let base = bases.get(index).copied().unwrap_or(0);
            front_end.set_vring_num(index, self.size).unwrap();
            front_end.set_vring_base(index, base).unwrap();
            front_end
                .set_vring_addr(index, &self.addresses(ring))
                .unwrap();
            front_end.set_vring_call(index, &self.calls[index]).unwrap();
            front_end.set_vring_err(index, &self.errors[index]).unwrap();
            front_end.set_vring_kick(index, &self.kicks[index]).unwrap();
            front_end.set_vring_enable(index, true).unwrap();
        }
    }

    pub(super) fn addresses(&self, ring: &Ring) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: THEIRS + ring.descriptors(),
            used_ring_addr: THEIRS + ring.used(),
            avail_ring_addr: THEIRS + ring.avail(),
            log_addr: None,
        }
    }

    pub(super) fn put(&self, at: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    /// Makes request number `n` available on a ring; its head.
    pub(super) fn submit(
        &mut self,
        ring: usize,
        n: u64,
        kind: u32,
        sector: u64,
        data: &[Piece],
    ) -> u16 {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(HEADERS + n * 16, &raw);
        self.put(STATUSES + n, &[0xee]);
        let mut pieces = vec![Piece::readable(HEADERS + n * 16, 16)];
        pieces.extend(data);
        pieces.push(Piece::writable(STATUSES + n, 1));
        self.rings[ring].add(&pieces)
    }

    pub(super) fn kick(&self, ring: usize) {
        self.kicks[ring].write(1).unwrap();
    }

    pub(super) fn status(&self, n: u64) -> u8 {
        self.get(STATUSES + n, 1)[0]
    }

    /// The next completion.
    #[track_caller]
    pub(super) fn complete(&mut self, ring: usize) -> u16 {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some((head, _)) = self.rings[ring].reap() {
                return head;
            }
            assert!(Instant::now() < until, "ring {ring} completes nothing");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// One request from submission to its status.
    #[track_caller]
    pub(super) fn request(&mut self, ring: usize, kind: u32, sector: u64, data: &[Piece]) -> u8 {
        let n = ring as u64;
        let head = self.submit(ring, n, kind, sector, data);
        self.kick(ring);
        assert_eq!(self.complete(ring), head);
        self.status(n)
    }
}

/// Asks for the record of what is in flight.
pub(super) fn inflight(
    front_end: &mut Frontend,
    queues: u16,
    size: u16,
) -> (VhostUserInflight, File) {
    let wanted = VhostUserInflight {
        mmap_size: 0,
        mmap_offset: 0,
        num_queues: queues,
        queue_size: size,
    };
    front_end.get_inflight_fd(&wanted).unwrap()
}
