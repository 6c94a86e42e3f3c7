//! One connection with a daemon.
//!
//! Replies wait here for a daemon that reads slowly and go with the connection: nobody else asked.
//! Events belong to the mailbox until they are on their way, so that the next daemon hears what
//! this one was not told.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use strake_api::control::{Body, Event, Packet, Reply};
use strake_api::job::JobId;
use strake_observe::{Result, State, recorder};

use super::wire::{Connection, Received, Sent};
use crate::Mailbox;
use crate::observations::BadPacket;

/// How many replies wait for a daemon that reads slowly before its connection is given up.
const BACKLOG_MAX: usize = 256;

/// A connection and what waits to be sent over it.
#[derive(Debug)]
pub(super) struct Session {
    connection: Arc<Connection>,
    /// Replies.
    backlog: VecDeque<(Packet, Vec<OwnedFd>)>,
    /// Whether an event waits in the mailbox for the daemon to read.
    full: bool,
    /// Whether the daemon said hello: events come only afterwards.
    pub(super) greeted: bool,
    /// The jobs whose commit this daemon was asked for. A question is posted by its job and
    /// repeated for a new daemon; where the two meet it is asked once all the same.
    asked: BTreeSet<JobId>,
}

/// Whether a session goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    GoesOn,
    Over,
}

impl Session {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        Self {
            connection,
            backlog: VecDeque::new(),
            full: false,
            greeted: false,
            asked: BTreeSet::new(),
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn receive(&self) -> Result<Received> {
        self.connection.receive()
    }

    /// Whether something waits until the daemon reads.
    pub(super) fn waits(&self) -> bool {
        self.full || !self.backlog.is_empty()
    }

    pub(super) fn reply(&mut self, id: u64, reply: Reply, fds: Vec<OwnedFd>) -> Life {
        let body = Body::Reply(reply);
        self.backlog.push_back((Packet { id, body }, fds));
        self.flush()
    }

    /// Sends the machine's events, as many as the daemon takes.
    pub(super) fn deliver(&mut self, mailbox: &Mailbox) -> Life {
        if self.flush() == Life::Over {
            return Life::Over;
        }
        self.full = false;
        while self.greeted && self.backlog.is_empty() {
            let Some(event) = mailbox.take() else {
                break;
            };
            if self.was_asked(&event) {
                continue;
            }
            match self.connection.send_event(&event) {
                Ok(Sent::Done) => self.note_asked(event),
                Ok(Sent::Full) => {
                    mailbox.put_back(event);
                    self.full = true;
                    break;
                }
                Ok(Sent::Closed) => {
                    mailbox.put_back(event);
                    return Life::Over;
                }
                // It cannot be said at all. It stays in this process's recorder.
                Err(seen) if seen.is::<BadPacket>() => {
                    recorder().record(seen, State::Open);
                }
                Err(seen) => {
                    // The socket does not work; the next one may.
                    recorder().record(seen, State::Open);
                    mailbox.put_back(event);
                    return Life::Over;
                }
            }
        }
        Life::GoesOn
    }

    fn was_asked(&self, event: &Event) -> bool {
        matches!(event, Event::JobAwaitsCommit { job } if self.asked.contains(job))
    }

    fn note_asked(&mut self, event: Event) {
        if let Event::JobAwaitsCommit { job } = event {
            self.asked.insert(job);
        }
    }

    /// Sends the replies that wait, as far as the daemon takes them.
    pub(super) fn flush(&mut self) -> Life {
        while let Some((packet, fds)) = self.backlog.front() {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match self.connection.send_with(packet, &fds) {
                Ok(Sent::Done) => {}
                Ok(Sent::Full) => break,
                Ok(Sent::Closed) => return Life::Over,
                Err(seen) => {
                    // A reply that cannot be sent is replaced by the reason.
                    let replacement = match &packet.body {
                        Body::Reply(_) => Some(Packet {
                            id: packet.id,
                            body: Body::Reply(Reply::Failed(seen)),
                        }),
                        _ => None,
                    };
                    if let Some(replacement) = replacement
                        && self.connection.send(&replacement).is_err()
                    {
                        return Life::Over;
                    }
                }
            }
            self.backlog.pop_front();
        }
        if self.backlog.len() > BACKLOG_MAX {
            return Life::Over;
        }
        Life::GoesOn
    }
}
