//! Changing the image below, in the header: a crash leaves the old one or the new one.
//!
//! The name is written to a part of the header's cluster that nothing refers to, and made durable.
//! Then the first sector is written, which has the place of the name and the format: a device
//! writes a sector whole or not at all.

use std::sync::Arc;

use strake_observe::Result;

use crate::header::{ATOMIC, Backing, Header, MAX_NAME};
use crate::num::{put, us};
use crate::state::Qcow;
use crate::{BadOption, HeaderFull, Store};

/// Changes the image below in the header of an image that nobody has open. The content is not
/// changed: the new image must read the same wherever this one has nothing of its own.
///
/// # Errors
/// When it is no qcow2 image, the name does not fit, or the store fails.
pub fn rebase(store: &dyn Store, backing: Option<&Backing>) -> Result<()> {
    let header = Header::read(store)?;
    let place = put_name(store, &header, backing)?;
    store.sync()?;
    change(store, &header, backing, place)?;
    store.sync()
}

/// Writes the name to where it will be referred to.
fn put_name(store: &dyn Store, header: &Header, backing: Option<&Backing>) -> Result<u64> {
    let Some(backing) = backing else {
        return Ok(0);
    };
    if backing.path.is_empty() || backing.path.len() > MAX_NAME || backing.path.contains('\0') {
        let path = store.path().to_owned();
        let why = "the path of its backing file is empty or too long".to_owned();
        return Err(BadOption { path, why }.into());
    }
    let place = free_place(header, backing.path.len() as u64).ok_or_else(|| full(store))?;
    store.write_at(place, backing.path.as_bytes())?;
    Ok(place)
}

fn full(store: &dyn Store) -> HeaderFull {
    HeaderFull {
        path: store.path().to_owned(),
    }
}

/// Writes the header with the name at that place, and says what it is then.
fn change(
    store: &dyn Store,
    header: &Header,
    backing: Option<&Backing>,
    place: u64,
) -> Result<Header> {
    let full = || full(store);
    let mut changed = header.clone();
    changed.set_backing(backing.cloned(), place);
    let mut first = vec![0; ATOMIC];
    store.read_at(0, &mut first)?;
    changed.encode_fixed(&mut first);
    let at = us(u64::from(changed.header_bytes));
    let room = ATOMIC.checked_sub(at).ok_or_else(full)?;
    let extensions = changed.encode_extensions(room).ok_or_else(full)?;
    if let Some(rest) = first.get_mut(at..) {
        rest.fill(0);
    }
    put(&mut first, at, &extensions);
    changed.extensions_end = (at + extensions.len()) as u64;
    store.write_at(0, &first)?;
    Ok(changed)
}

/// Where `len` bytes of the first cluster are used by nothing, in sectors of their own.
fn free_place(header: &Header, len: u64) -> Option<u64> {
    let sector = ATOMIC as u64;
    let old = header.backing_at.0..header.backing_at.0 + u64::from(header.backing_at.1);
    let mut at = header.extensions_end.max(sector).next_multiple_of(sector);
    while at + len <= header.cluster() {
        let end = (at + len).next_multiple_of(sector);
        if old.is_empty() || end <= old.start || old.end.next_multiple_of(sector) <= at {
            return Some(at);
        }
        at += sector;
    }
    None
}

impl Qcow {
    /// Changes the image below in the header of this open one. One at a time does.
    pub(crate) fn rebase(self: &Arc<Self>, backing: Option<&Backing>) -> Result<()> {
        self.flush()?;
        // The guest's requests need the lock: no sync is waited for with it.
        let place = put_name(&*self.store, &self.lock().header, backing)?;
        self.store.sync()?;
        {
            let mut state = self.lock();
            state.header = change(&*self.store, &state.header, backing, place)?;
        }
        self.store.sync()
    }
}
