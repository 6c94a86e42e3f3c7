//! Measures random requests on an export: `measure URI read|write BYTES DEPTH SECONDS`.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{Access, Buffer, Event, Image, Operation, Request};
use strake_nbd::{NbdImage, Uri};
use strake_observe::Result;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [uri, what, bytes, depth, seconds] = arguments.as_slice() else {
        eprintln!("usage: measure URI read|write BYTES DEPTH SECONDS");
        return Ok(());
    };
    let number = |text: &String| text.parse::<u64>().unwrap_or(1);
    let (bytes, depth, limit) = (number(bytes), number(depth), number(seconds));
    let (op, access) = match what.as_str() {
        "write" => (Operation::Write, Access::ReadWrite),
        _ => (Operation::Read, Access::ReadOnly),
    };
    let uri: Uri = uri.parse()?;
    let image = NbdImage::connect(&uri, access)?;
    let blocks = (image.size() / bytes).max(1);
    let size = usize::try_from(bytes).unwrap_or(4096);
    let mut memory: Vec<Vec<u8>> = (0..depth).map(|_| vec![0x5au8; size]).collect();
    let event = Arc::new(Event::new()?);
    let mut queue = image.open_queue(u32::try_from(depth).unwrap_or(1), &event)?;
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut idle: Vec<u64> = (0..depth).collect();
    let (began, limit) = (Instant::now(), Duration::from_secs(limit));
    let mut done = 0u64;
    while began.elapsed() < limit || queue.in_flight() > 0 {
        while let Some(tag) = idle.pop() {
            if began.elapsed() >= limit {
                break;
            }
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = usize::try_from(tag).unwrap_or(0);
            let Some(data) = memory.get_mut(at) else {
                break;
            };
            // SAFETY: each tag has its memory, which is kept until the end, after the queue is
            // empty.
            let buffers = vec![unsafe { Buffer::new(data.as_mut_ptr(), data.len()) }];
            let offset = random % blocks * bytes;
            queue.submit(Request {
                tag,
                op,
                offset,
                buffers,
            });
        }
        queue.push()?;
        let _ = event.wait(Duration::from_millis(100));
        event.clear();
        let mut failed = None;
        queue.reap(&mut |completion| {
            idle.push(completion.tag);
            done += 1;
            if let Err(seen) = completion.result {
                failed = Some(seen);
            }
        });
        if let Some(seen) = failed {
            return Err(seen);
        }
    }
    let took = began.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = done as f64 / took;
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let mib = rate * bytes as f64 / 1_048_576.0;
    println!("{rate:.0} requests/s, {mib:.0} MiB/s");
    Ok(())
}
