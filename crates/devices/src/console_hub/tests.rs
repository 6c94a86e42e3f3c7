use std::io::{Read, Write};

use super::*;

struct Sink(Mutex<(Vec<u8>, usize)>);

impl ConsoleInput for Sink {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut sink = self.0.lock().unwrap();
        let taken = bytes.len().min(sink.1);
        sink.0.extend(&bytes[..taken]);
        taken
    }
}

fn eventually(what: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !what() {
        assert!(Instant::now() < until, "it did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn logged(file: &File) -> String {
    let mut file = file.try_clone().unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

fn log() -> (tempfile::NamedTempFile, File) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let append = File::options().append(true).open(file.path()).unwrap();
    (file, append)
}

#[test]
fn output_goes_to_the_log_and_to_whoever_is_attached() {
    let (file, append) = log();
    let hub = ConsoleHub::new("console", append).unwrap();
    hub.write(b"early ");
    let (ours, theirs) = UnixStream::pair().unwrap();
    hub.attach(theirs.into()).unwrap();
    eventually(|| logged(file.as_file()) == "early ");
    hub.write(b"late");
    let mut got = [0; 4];
    (&ours).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"late");
    hub.close();
    assert_eq!(logged(file.as_file()), "early late");
}

#[test]
fn a_terminal_that_does_not_read_does_not_hold_the_log() {
    let (file, append) = log();
    let hub = ConsoleHub::new("console", append).unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    hub.attach(theirs.into()).unwrap();
    for _ in 0..100 {
        hub.write(&[b'x'; 16 * 1024]);
        std::thread::sleep(Duration::from_millis(1));
    }
    hub.write(b"end");
    hub.close();
    assert!(logged(file.as_file()).ends_with("end"));
}

#[test]
fn input_that_finds_no_room_waits_and_arrives_whole() {
    let (_file, append) = log();
    let hub = ConsoleHub::new("console", append).unwrap();
    let sink = Arc::new(Sink(Mutex::new((Vec::new(), 3))));
    hub.connect_input(sink.clone());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    hub.attach(theirs.into()).unwrap();
    let sent: Vec<u8> = (0..200).collect();
    ours.write_all(&sent).unwrap();
    eventually(|| sink.0.lock().unwrap().0 == sent);
}

/// How long a thread of this process has been computing.
fn worked(thread: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let read = |task: &std::path::Path, file: &str| std::fs::read_to_string(task.join(file));
    let task = tasks
        .map(|task| task.unwrap().path())
        .find(|task| read(task, "comm").is_ok_and(|name| name.trim() == thread))
        .unwrap();
    // User and system time, in ticks of 10 ms.
    let stat = read(&task, "stat").unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    let ticks = fields.skip(11).take(2).map(|n| n.parse::<u64>().unwrap());
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

#[test]
fn a_terminal_that_leaves_with_unread_input_costs_nothing_and_is_dismissed() {
    let (_file, append) = log();
    let hub = ConsoleHub::new("hub-left", append).unwrap();
    let sink = Arc::new(Sink(Mutex::new((Vec::new(), 0))));
    hub.connect_input(sink);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    hub.attach(theirs.into()).unwrap();
    ours.write_all(b"nobody reads this").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(ours);
    let before = worked("hub-left");
    std::thread::sleep(Duration::from_millis(1000));
    let spent = worked("hub-left") - before;
    assert!(spent < Duration::from_millis(200), "{spent:?} of a second");
    eventually(|| hub.shared.lock().streams == 0);
}

#[test]
fn input_of_a_terminal_that_has_left_still_arrives() {
    let (_file, append) = log();
    let hub = ConsoleHub::new("console", append).unwrap();
    let sink = Arc::new(Sink(Mutex::new((Vec::new(), 0))));
    hub.connect_input(sink.clone());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    hub.attach(theirs.into()).unwrap();
    let sent = vec![b'x'; 2 * CHUNK];
    ours.write_all(&sent).unwrap();
    drop(ours);
    std::thread::sleep(Duration::from_millis(100));
    sink.0.lock().unwrap().1 = CHUNK;
    eventually(|| sink.0.lock().unwrap().0 == sent);
    eventually(|| hub.shared.lock().streams == 0);
}

#[test]
fn terminals_come_and_go() {
    let (_file, append) = log();
    let hub = ConsoleHub::new("console", append).unwrap();
    for _ in 0..3 {
        let pairs: Vec<_> = (0..STREAM_LIMIT)
            .map(|_| {
                let (ours, theirs) = UnixStream::pair().unwrap();
                hub.attach(theirs.into()).unwrap();
                ours
            })
            .collect();
        let (_, one_more) = UnixStream::pair().unwrap();
        assert!(hub.attach(one_more.into()).is_err());
        drop(pairs);
        eventually(|| hub.shared.lock().streams == 0);
    }
}
