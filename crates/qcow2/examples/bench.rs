//! One measurement of a qcow2 image, in the way of `qemu-img bench`: the same request again and
//! again, each a step further, so many at once.
//!
//! `bench PATH read|write DEPTH COUNT STEP [FLUSH_INTERVAL]`
#![allow(unsafe_code, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{Access, Buffer, Event, Image, Operation, Request};
use strake_qcow2::{ChainPart, FileStore, Format, open_chain, open_member, survey};

const BYTES: usize = 4096;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|it| it.parse::<u64>().ok());
    let [path, what, ..] = arguments.as_slice() else {
        eprintln!("bench PATH read|write DEPTH COUNT STEP [FLUSH_INTERVAL]");
        return;
    };
    let (depth, count) = (number(2).unwrap_or(1), number(3).unwrap_or(10_000));
    let (step, flush) = (number(4).unwrap_or(4096), number(5).unwrap_or(0));
    let op = match what.as_str() {
        "write" => Operation::Write,
        _ => Operation::Read,
    };
    let members = survey(path.as_ref(), Format::Qcow2, &|_| true).unwrap();
    let parts = members.iter().enumerate().map(|(number, member)| {
        let access = match number {
            0 => Access::ReadWrite,
            _ => Access::ReadOnly,
        };
        let fd = open_member(member, access, true).unwrap();
        let path = member.path.display().to_string();
        ChainPart {
            store: Arc::new(FileStore::from_fd(fd, path, access).unwrap()),
            format: member.format,
            access,
        }
    });
    let image = open_chain(parts.collect()).unwrap();
    let event = Arc::new(Event::new().unwrap());
    let mut queue = image
        .open_queue(u32::try_from(depth).unwrap(), &event)
        .unwrap();
    // Page-aligned, as a guest's is.
    let mut memory = vec![0x5au8; BYTES * (usize::try_from(depth).unwrap() + 1)];
    let start = memory.as_mut_ptr().align_offset(BYTES);
    let mut free: Vec<u64> = (0..depth).collect();
    let (mut offset, mut begun, mut ended) = (0, 0, 0);
    let from = Instant::now();
    while ended < count {
        while begun < count
            && let Some(tag) = free.pop()
        {
            let at = start + usize::try_from(tag).unwrap() * BYTES;
            // SAFETY: the memory outlives the queue, which is dropped before it.
            let buffer = unsafe { Buffer::new(memory.as_mut_ptr().add(at), BYTES) };
            let flushing = flush > 0 && begun % flush == flush - 1;
            queue.submit(Request {
                tag,
                op: if flushing { Operation::Flush } else { op },
                offset,
                buffers: if flushing { vec![] } else { vec![buffer] },
            });
            begun += 1;
            offset += step;
            if offset + BYTES as u64 > image.size() {
                offset %= image.size();
                offset -= offset % BYTES as u64;
            }
        }
        queue.push().unwrap();
        if event.wait(Duration::from_secs(10)) {
            event.clear();
        }
        queue.reap(&mut |done| {
            done.result.unwrap();
            free.push(done.tag);
            ended += 1;
        });
    }
    let took = from.elapsed();
    drop(queue);
    let per_second = u128::from(count) * 1_000_000 / took.as_micros().max(1);
    println!("{per_second} per second ({:.3} s)", took.as_secs_f64());
}
