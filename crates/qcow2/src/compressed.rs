//! Clusters that are compressed in the file: read, never written.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use strake_observe::Result;

use crate::num::us;
use crate::state::Qcow;
use crate::{Damaged, Store};

impl Qcow {
    /// The whole cluster whose compressed form is at `host`.
    pub(crate) fn unpack(&self, host: u64, bytes: u64) -> Result<Vec<u8>> {
        let store: &dyn Store = &*self.store;
        let mut packed = vec![0; us(bytes)];
        store.read_at(host, &mut packed)?;
        let mut cluster = vec![0; us(self.cluster())];
        let mut inflater = Box::<DecompressorOxide>::default();
        let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, got) = decompress(&mut inflater, &packed, &mut cluster, 0, flags);
        // What follows the stream in its last sector is not part of it.
        let ended = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
        if !ended || got != cluster.len() {
            let path = store.path().to_owned();
            let what = format!("a compressed cluster at offset {host} cannot be unpacked");
            return Err(Damaged { path, what }.into());
        }
        Ok(cluster)
    }
}
