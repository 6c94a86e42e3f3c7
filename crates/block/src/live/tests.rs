//! The end of a queue whose engine broke.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use strake_observe::Result;

use super::LiveDisk;
use crate::{
    Access, BLOCK_BYTES, Completion, DirtyBitmap, Event, Image, ImageQueue, Operation, Request,
    RingBroken,
};

/// What was seen when the image's queue was dropped: requests inside the gate, and marked blocks.
type Seen = Mutex<Option<(u32, u64)>>;

/// An image whose queues take requests and never give them back.
#[derive(Debug, Default)]
struct BrokenImage {
    witness: Arc<Witness>,
}

#[derive(Debug, Default)]
struct Witness {
    disk: OnceLock<Weak<LiveDisk>>,
    bitmap: OnceLock<Arc<DirtyBitmap>>,
    seen: Seen,
}

#[derive(Debug)]
struct BrokenQueue {
    witness: Arc<Witness>,
    flying: usize,
}

impl Image for BrokenImage {
    fn path(&self) -> &str {
        "broken.raw"
    }

    fn size(&self) -> u64 {
        16 * BLOCK_BYTES
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn open_queue(&self, _depth: u32, _event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        Ok(Box::new(BrokenQueue {
            witness: Arc::clone(&self.witness),
            flying: 0,
        }))
    }

    fn read_at(&self, _offset: u64, _data: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self, _from: u64) -> Result<Option<Range<u64>>> {
        Ok(None)
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(false)
    }
}

impl ImageQueue for BrokenQueue {
    fn submit(&mut self, _request: Request) {
        self.flying += 1;
    }

    fn push(&mut self) -> Result<()> {
        Err(RingBroken {
            path: "broken.raw".into(),
        }
        .into())
    }

    fn reap(&mut self, _done: &mut dyn FnMut(Completion)) {}

    fn in_flight(&self) -> usize {
        self.flying
    }
}

impl Drop for BrokenQueue {
    fn drop(&mut self) {
        let disk = self.witness.disk.get().and_then(Weak::upgrade);
        if let (Some(disk), Some(bitmap)) = (disk, self.witness.bitmap.get()) {
            *self.witness.seen.lock().unwrap() = Some((disk.gate.inside(), bitmap.marked()));
        }
    }
}

#[test]
fn a_broken_queue_marks_what_it_lost_and_leaves_the_gate_last() {
    let image = BrokenImage::default();
    let witness = Arc::clone(&image.witness);
    let disk = LiveDisk::new("root", Arc::new(image));
    let bitmap = Arc::new(DirtyBitmap::new(disk.size()).unwrap());
    witness.disk.set(Arc::downgrade(&disk)).unwrap();
    witness.bitmap.set(Arc::clone(&bitmap)).unwrap();
    disk.begin_tracking(Arc::clone(&bitmap));
    let mut queue = disk.queue(8).unwrap();
    for block in [3, 7] {
        queue.submit(Request {
            tag: block,
            op: Operation::WriteZeroes {
                len: 512,
                unmap: false,
            },
            offset: block * BLOCK_BYTES,
            buffers: Vec::new(),
        });
    }
    queue.submit(Request {
        tag: 0,
        op: Operation::Flush,
        offset: 0,
        buffers: Vec::new(),
    });
    assert!(queue.push().is_err());
    assert_eq!(disk.gate.inside(), 3);
    drop(queue);
    // The image's queue was gone before any of them left or was marked.
    assert_eq!(*witness.seen.lock().unwrap(), Some((3, 0)));
    assert_eq!(disk.gate.inside(), 0);
    assert!(bitmap.is_marked(3) && bitmap.is_marked(7));
    assert_eq!(bitmap.marked(), 2);
}
