//! How many pages a fault brings along: 1, 8 or 32, by how the last ones were used.
//!
//! The last page that is brought along stays unmapped, as a probe: a fault on it says that the
//! guest reads on, its eviction untouched that it does not. While nothing is brought along, a fault
//! next to a page that is in memory says that it would have been worth it.

const WIDTHS: [usize; 3] = [1, 8, 32];

/// Evidence that a step up or down takes. A probe that is evicted untouched is heard later than one
/// that is hit, so a step down takes less.
const UP: i32 = 4;
const DOWN: i32 = -4;

/// The reader's width now.
#[derive(Debug)]
pub(crate) struct Ahead {
    level: usize,
    score: i32,
}

impl Ahead {
    pub(crate) fn new() -> Self {
        Self { level: 1, score: 0 }
    }

    /// Pages that a fault brings, itself included.
    pub(crate) fn width(&self) -> usize {
        WIDTHS.get(self.level).copied().unwrap_or(1)
    }

    /// What was brought along was used, or would have been.
    pub(crate) fn useful(&mut self) {
        self.score += 1;
        if self.score >= UP {
            self.score = 0;
            self.level = (self.level + 1).min(WIDTHS.len() - 1);
        }
    }

    /// What was brought along was evicted untouched, `count` times.
    pub(crate) fn useless(&mut self, count: u64) {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        self.score = self.score.saturating_sub(count.saturating_mul(2));
        if self.score <= DOWN {
            self.score = 0;
            self.level = self.level.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_use_and_falls_without() {
        let mut ahead = Ahead::new();
        assert_eq!(ahead.width(), 8);
        for _ in 0..100 {
            ahead.useful();
        }
        assert_eq!(ahead.width(), 32);
        for _ in 0..100 {
            ahead.useless(1);
        }
        assert_eq!(ahead.width(), 1);
        for _ in 0..UP {
            ahead.useful();
        }
        assert_eq!(ahead.width(), 8);
    }
}
