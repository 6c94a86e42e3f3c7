//! The word of a page: `disk + 1` (6 bits), block (32 bits), generation (26 bits). Zero is nothing.

/// Disks that a word can name.
pub(crate) const DISKS_MAX: u32 = 63;

/// Blocks of a disk that a word can name: 16 TiB.
pub(crate) const BLOCKS_MAX: u64 = 1 << 32;

const GENERATION_BITS: u32 = 26;
const BLOCK_BITS: u32 = 32;

/// What fits of a generation.
pub(crate) const GENERATION_MASK: u32 = (1 << GENERATION_BITS) - 1;

/// What a word says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) disk: u32,
    pub(crate) block: u64,
    pub(crate) generation: u32,
}

impl Said {
    pub(crate) fn word(self) -> u64 {
        let disk = u64::from(self.disk + 1) << (BLOCK_BITS + GENERATION_BITS);
        disk | self.block << GENERATION_BITS | u64::from(self.generation & GENERATION_MASK)
    }

    pub(crate) fn of(word: u64) -> Option<Self> {
        let disk = u32::try_from(word >> (BLOCK_BITS + GENERATION_BITS)).ok()?;
        Some(Self {
            disk: disk.checked_sub(1)?,
            block: word >> GENERATION_BITS & (BLOCKS_MAX - 1),
            generation: u32::try_from(word & u64::from(GENERATION_MASK)).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_word_says_what_was_put_into_it(
            disk in 0..DISKS_MAX,
            block in 0..BLOCKS_MAX,
            generation in 0..=GENERATION_MASK,
        ) {
            let said = Said { disk, block, generation };
            prop_assert_eq!(Said::of(said.word()), Some(said));
        }
    }

    #[test]
    fn nothing_is_nothing() {
        assert_eq!(Said::of(0), None);
    }
}
