//! Any sequence of writes, zeroes, discards, snapshots, commits and streams, over a chain of up to
//! four layers, against plain memory and against qemu-img.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{check, content, make, open, open_as, pattern, peers, queue, read_all, store};
use proptest::prelude::*;
use strake_block::{Access, Image, Operation, RawImage};
use strake_qcow2::{Backing, Commit, CreateOptions, Format, Progress, Qcow2Image, Stream, rebase};

/// One layer of the model: its file, and what the chain that begins with it reads as.
struct Layer {
    name: String,
    format: Format,
    view: Vec<u8>,
}

struct World {
    dir: tempfile::TempDir,
    layers: Vec<Layer>,
    image: Option<Arc<Qcow2Image>>,
    made: u32,
}

#[derive(Debug, Clone)]
enum Act {
    Write { at: u32, sectors: u32, seed: u8 },
    Zero { at: u32, sectors: u32, unmap: bool },
    Discard { at: u32, sectors: u32 },
    Flush,
    Reopen,
    Grow { sectors: u32 },
    Snapshot { bits: u32 },
    Commit { layer: u8 },
    Stream { keep: bool },
}

fn act() -> impl Strategy<Value = Act> {
    let at = 0u32..4000;
    let sectors = prop_oneof![1u32..4, 1u32..40, 1u32..600];
    prop_oneof![
        8 => (at.clone(), sectors.clone(), any::<u8>())
            .prop_map(|(at, sectors, seed)| Act::Write { at, sectors, seed }),
        3 => (at.clone(), sectors.clone(), any::<bool>())
            .prop_map(|(at, sectors, unmap)| Act::Zero { at, sectors, unmap }),
        2 => (at, sectors).prop_map(|(at, sectors)| Act::Discard { at, sectors }),
        1 => Just(Act::Flush),
        1 => Just(Act::Reopen),
        1 => (1u32..900).prop_map(|sectors| Act::Grow { sectors }),
        2 => (12u32..17).prop_map(|bits| Act::Snapshot { bits }),
        2 => any::<u8>().prop_map(|layer| Act::Commit { layer }),
        1 => any::<bool>().prop_map(|keep| Act::Stream { keep }),
    ]
}

fn bytes(sectors: u32) -> usize {
    usize::try_from(sectors).unwrap() * 512
}

impl World {
    fn new(raw: bool, bits: u32) -> Self {
        let dir = common::dir();
        let view = if raw {
            pattern(77, 1000 * 512)
        } else {
            vec![0; 1000 * 512]
        };
        let name = "base".to_owned();
        let path = dir.path().join(&name);
        let format = if raw { Format::Raw } else { Format::Qcow2 };
        if raw {
            std::fs::write(&path, &view).unwrap();
        } else {
            make(
                &path,
                &CreateOptions::new(view.len() as u64).cluster_bits(bits),
            );
        }
        let layers = vec![Layer { name, format, view }];
        let mut world = Self {
            dir,
            layers,
            image: None,
            made: 0,
        };
        if raw {
            world.snapshot(bits);
        }
        world
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.dir.path().join(&self.layers[layer].name)
    }

    fn image(&mut self) -> Arc<Qcow2Image> {
        let path = self.path(0);
        Arc::clone(self.image.get_or_insert_with(|| open(&path)))
    }

    fn snapshot(&mut self, bits: u32) {
        self.image = None;
        self.made += 1;
        let below = &self.layers[0];
        let name = format!("layer{}", self.made);
        let options = CreateOptions::new(below.view.len() as u64)
            .cluster_bits(bits)
            .backing(below.name.clone(), below.format);
        make(&self.dir.path().join(&name), &options);
        let view = below.view.clone();
        self.layers.insert(
            0,
            Layer {
                name,
                format: Format::Qcow2,
                view,
            },
        );
    }

    /// Clips a range to the disk.
    fn clip(&self, at: u32, sectors: u32) -> std::ops::Range<usize> {
        let len = self.layers[0].view.len();
        let start = bytes(at).min(len - 512);
        start..(start + bytes(sectors)).min(len)
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Write { at, sectors, seed } => {
                let range = self.clip(at, sectors);
                let data = pattern(u64::from(seed) + 1, range.len());
                queue(&self.image())
                    .write(range.start as u64, &data)
                    .unwrap();
                self.layers[0].view[range].copy_from_slice(&data);
            }
            Act::Zero { at, sectors, unmap } => {
                let range = self.clip(at, sectors);
                let len = range.len() as u64;
                queue(&self.image())
                    .operate(Operation::WriteZeroes { len, unmap }, range.start as u64)
                    .unwrap();
                self.layers[0].view[range].fill(0);
            }
            Act::Discard { at, sectors } => {
                let range = self.clip(at, sectors);
                let len = range.len() as u64;
                let image = self.image();
                queue(&image)
                    .operate(Operation::Discard { len }, range.start as u64)
                    .unwrap();
                let mut now = vec![0; range.len()];
                image.read_at(range.start as u64, &mut now).unwrap();
                for (now, was) in now
                    .chunks(512)
                    .zip(self.layers[0].view[range.clone()].chunks(512))
                {
                    assert!(now == was || now.iter().all(|byte| *byte == 0));
                }
                self.layers[0].view[range].copy_from_slice(&now);
            }
            Act::Flush => self.image().flush().unwrap(),
            Act::Reopen => self.image = None,
            Act::Grow { sectors } => {
                let size = self.layers[0].view.len() + bytes(sectors);
                if size < 4 << 20 {
                    self.image().grow(size as u64).unwrap();
                    self.layers[0].view.resize(size, 0);
                }
            }
            Act::Snapshot { bits } => {
                if self.layers.len() < 4 {
                    self.snapshot(bits);
                }
            }
            Act::Commit { layer } => self.commit(usize::from(layer)),
            Act::Stream { keep } => self.stream(keep),
        }
    }

    fn commit(&mut self, layer: usize) {
        if self.layers.len() < 2 {
            return;
        }
        let layer = layer % (self.layers.len() - 1);
        let size = self.layers[layer].view.len();
        let (grows, last) = (
            self.layers[layer + 1].view.len() < size,
            self.layers[layer + 1].format == Format::Raw,
        );
        if last && (grows || layer == 0) {
            // A raw file is made longer by whoever owns it; and a chain here begins with qcow2.
            return;
        }
        self.image = None;
        let child = open_as(&self.path(layer), Access::ReadOnly);
        let path = self.path(layer + 1);
        let parent: Arc<dyn Image> = if last {
            let file = std::fs::File::options().read(true).write(true).open(&path);
            Arc::new(RawImage::from_fd(file.unwrap().into(), "raw", Access::ReadWrite).unwrap())
        } else {
            let parent = open(&path);
            parent.grow(size as u64).unwrap();
            parent
        };
        let mut at = 0;
        loop {
            // From the cursor each time, as after a crash.
            let mut commit = Commit::new(Arc::clone(&child), 0, Arc::clone(&parent), at).unwrap();
            match commit.step(100_000).unwrap() {
                Progress::At(next) => at = next,
                Progress::Done => break,
            }
        }
        drop((child, parent));
        if layer > 0 {
            let below = &self.layers[layer + 1];
            let backing = Backing {
                path: below.name.clone(),
                format: Some(below.format.name().to_owned()),
            };
            rebase(
                &store(&self.path(layer - 1), Access::ReadWrite),
                Some(&backing),
            )
            .unwrap();
        }
        std::fs::remove_file(self.path(layer)).unwrap();
        let gone = self.layers.remove(layer);
        self.layers[layer].view = gone.view;
    }

    fn stream(&mut self, keep: bool) {
        let last = self.layers.len() - 1;
        if last == 0 {
            return;
        }
        let image = self.image();
        let base = keep.then(|| {
            let below = &self.layers[last];
            let backing = Backing {
                path: below.name.clone(),
                format: Some(below.format.name().to_owned()),
            };
            (last, backing)
        });
        let mut at = 0;
        loop {
            let mut stream = Stream::new(Arc::clone(&image), base.clone(), at).unwrap();
            match stream.step(200_000).unwrap() {
                Progress::At(next) => at = next,
                Progress::Done => break,
            }
        }
        let left = if keep { 1..last } else { 1..last + 1 };
        for layer in left.clone() {
            std::fs::remove_file(self.path(layer)).unwrap();
        }
        self.layers.drain(left);
        assert_eq!(image.depth(), self.layers.len());
    }

    fn compare(&mut self) {
        let image = self.image();
        let view = &self.layers[0].view;
        assert_eq!(image.size(), view.len() as u64);
        assert!(read_all(&*image) == *view, "read_at differs");
        let mut data = vec![0xee; view.len()];
        queue(&image).read(0, &mut data).unwrap();
        assert!(data == *view, "a queue's read differs");
        // What is said to be zeroes is.
        let (mut at, len) = (0, view.len() as u64);
        while at < len {
            let next = image.allocated(at).unwrap().unwrap_or(len..len);
            let gap = usize::try_from(at).unwrap()..usize::try_from(next.start).unwrap();
            assert!(
                view[gap].iter().all(|byte| *byte == 0),
                "data outside of what is allocated"
            );
            assert!(next.end > at || next.start == len);
            at = next.end;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|it| it.parse().ok()).unwrap_or(24),
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_reads_as_the_model(
        raw in any::<bool>(),
        bits in 12u32..17,
        acts in prop::collection::vec(act(), 1..40),
    ) {
        if !peers() {
            return Ok(());
        }
        let mut world = World::new(raw, bits);
        for act in &acts {
            world.act(act);
        }
        world.compare();
        world.image = None;
        for layer in 0..world.layers.len() {
            if world.layers[layer].format == Format::Qcow2 {
                let path = world.path(layer);
                check(&path);
                prop_assert!(content(&path) == world.layers[layer].view, "layer {layer}");
            }
        }
        world.compare();
    }
}
