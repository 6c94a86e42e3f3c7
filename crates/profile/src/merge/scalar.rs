//! Fields with one value.

use std::borrow::Cow;

use super::{Deciding, Rank, Source, Statement, Why, by_rank, outranked};
use crate::profile::Operator;
use crate::value::Value;

/// A bound in force: its number, and who said it.
type Bound<'s, 'a> = Option<(u64, &'s Statement<'a>)>;

/// What was chosen: the rank it was said with, and the first who said it.
type Chosen<'a, T> = Option<(T, Rank, Source<'a>)>;

fn why_set_yields(lower: Rank, upper: Rank, same: bool) -> Why {
    if same {
        return Why::SaidAlready;
    }
    match lower {
        Rank::Default(_) | Rank::Schema if upper > Rank::Default(i32::MAX) => Why::OnlyDefault,
        _ => outranked(upper),
    }
}

/// A number that is replaced by rank, within bounds.
pub(super) fn bounded<'a>(one: &mut Deciding<'a, '_>, statements: &[Statement<'a>]) {
    let (mut low, mut high): (Bound<'_, 'a>, Bound<'_, 'a>) = (None, None);
    let mut chosen: Chosen<'a, u64> = None;
    for (rank, group) in by_rank(statements) {
        // First the bounds: each against what has a higher rank.
        let (mut group_low, mut group_high): (Bound<'_, 'a>, Bound<'_, 'a>) = (None, None);
        for said in group {
            let Some(n) = said.int() else { continue };
            let is_min = match said.operator {
                Operator::Min => true,
                Operator::Max => false,
                _ => continue,
            };
            let broken = |v: u64| if is_min { v < n } else { v > n };
            let opposite = if is_min { high } else { low };
            if let Some((v, _, by)) = chosen
                && broken(v)
            {
                one.resolved
                    .overrode
                    .push(said.yields(by, Why::ValueOutranks));
            } else if let Some((v, by)) = opposite
                && broken(v)
            {
                let yielded = said.yields(by.source, Why::BoundOutranks);
                one.resolved.overrode.push(yielded);
            } else {
                one.resolved.held.push(said.source);
                let tightest = if is_min {
                    &mut group_low
                } else {
                    &mut group_high
                };
                let tighter = match *tightest {
                    None => true,
                    Some((t, _)) => broken(t),
                };
                if tighter {
                    *tightest = Some((n, said));
                }
            }
        }
        if let (Some((min, a)), Some((max, b))) = (group_low, group_high)
            && min > max
        {
            one.conflict(a, b);
            return;
        }
        // Then the values.
        let mut first: Option<(u64, &Statement<'a>)> = None;
        let mut sources = Vec::new();
        for said in group {
            let Some(n) = said.int() else { continue };
            if !matches!(said.operator, Operator::Set | Operator::Default) {
                continue;
            }
            if let Some((v, upper, by)) = chosen {
                let why = why_set_yields(rank, upper, v == n);
                one.resolved.overrode.push(said.yields(by, why));
                continue;
            }
            match first {
                Some((v, other)) if v != n => {
                    one.conflict(other, said);
                    return;
                }
                _ => first = first.or(Some((n, said))),
            }
            sources.push(said);
        }
        if let Some((n, said)) = first {
            let too_low = group_low.filter(|(min, _)| n < *min);
            let too_high = group_high.filter(|(max, _)| n > *max);
            if let Some((_, by)) = too_low.or(too_high) {
                one.conflict(said, by);
                return;
            }
            let moved = match (low, high) {
                (Some((min, by)), _) if n < min => Some((min, by)),
                (_, Some((max, by))) if n > max => Some((max, by)),
                _ => None,
            };
            if let Some((to, by)) = moved {
                for said in sources {
                    let why = match (rank, by.rank) {
                        (Rank::Own, _) => Why::Locked,
                        _ => Why::Bounded,
                    };
                    one.resolved.overrode.push(said.yields(by.source, why));
                }
                one.resolved.held.retain(|held| *held != by.source);
                one.resolved.origin.push(by.source);
                chosen = Some((to, by.rank, by.source));
            } else {
                one.resolved
                    .origin
                    .extend(sources.iter().map(|said| said.source));
                chosen = Some((n, rank, said.source));
            }
        }
        low = tighter(low, group_low, |new, old| new > old);
        high = tighter(high, group_high, |new, old| new < old);
    }
    if chosen.is_none()
        && one.field.absent_is_unlimited
        && let Some((max, by)) = high
    {
        one.resolved.held.retain(|held| *held != by.source);
        one.resolved.origin.push(by.source);
        chosen = Some((max, by.rank, by.source));
    }
    one.resolved.value = chosen.map(|(n, _, _)| Cow::Owned(Value::Int(n)));
}

fn tighter<'s, 'a>(
    old: Bound<'s, 'a>,
    new: Bound<'s, 'a>,
    is_tighter: impl Fn(u64, u64) -> bool,
) -> Bound<'s, 'a> {
    match (old, new) {
        (Some((a, _)), Some((b, _))) if !is_tighter(b, a) => old,
        (_, Some(_)) => new,
        (_, None) => old,
    }
}

/// A text, a truth or a whole set that is replaced by rank, less what is forbidden.
pub(super) fn replaced<'a>(one: &mut Deciding<'a, '_>, statements: &[Statement<'a>]) {
    let mut forbidding: Vec<&Statement<'a>> = Vec::new();
    let mut chosen: Chosen<'a, Cow<'a, Value>> = None;
    for (rank, group) in by_rank(statements) {
        let known = forbidding.len();
        for said in group {
            if said.operator != Operator::Forbid {
                continue;
            }
            match &chosen {
                Some((value, _, by)) if forbids(said, value) => {
                    let yielded = said.yields(*by, Why::ValueOutranks);
                    one.resolved.overrode.push(yielded);
                }
                _ => {
                    one.resolved.held.push(said.source);
                    forbidding.push(said);
                }
            }
        }
        let mut first: Option<&Statement<'a>> = None;
        let mut sources = Vec::new();
        for said in group {
            if !matches!(said.operator, Operator::Set | Operator::Default) {
                continue;
            }
            if let Some((value, upper, by)) = &chosen {
                let why = why_set_yields(rank, *upper, *value == said.value);
                one.resolved.overrode.push(said.yields(*by, why));
                continue;
            }
            let by = forbidding
                .iter()
                .enumerate()
                .find(|(_, by)| forbids(by, &said.value));
            match by {
                Some((at, by)) if at >= known => {
                    one.conflict(said, by);
                    return;
                }
                Some((_, by)) => {
                    let why = match rank {
                        Rank::Own => Why::Locked,
                        _ => Why::Forbidden,
                    };
                    one.resolved.overrode.push(said.yields(by.source, why));
                    continue;
                }
                None => {}
            }
            match first {
                Some(other) if other.value != said.value => {
                    one.conflict(other, said);
                    return;
                }
                _ => first = first.or(Some(said)),
            }
            sources.push(said.source);
        }
        if let Some(said) = first {
            one.resolved.origin = sources;
            chosen = Some((said.value.clone(), rank, said.source));
        }
    }
    one.resolved.value = chosen.map(|(value, _, _)| value);
}

fn forbids(rule: &Statement<'_>, value: &Value) -> bool {
    match (&*rule.value, value) {
        (Value::Set(words), Value::Text(text)) => words.contains(text),
        (never, value) => never == value,
    }
}

/// A number of which the smallest or the largest counts, whoever says it.
pub(super) fn extreme<'a>(one: &mut Deciding<'a, '_>, statements: &[Statement<'a>], why: Why) {
    let locked = statements
        .iter()
        .find(|said| said.rank == Rank::Locked)
        .map(|said| said.source);
    let set = |said: &&Statement<'a>| said.rank > Rank::Default(i32::MAX);
    let sets = statements.iter().any(|said| set(&said));
    let ruled = statements.iter().any(|said| said.rank > Rank::Schema);
    // Of those who count, the extreme one.
    let counts = |said: &Statement<'a>| match said.rank {
        Rank::Own => locked.is_none(),
        Rank::Locked | Rank::Profile(_) => true,
        Rank::Default(_) => !sets,
        Rank::Schema => !ruled,
    };
    let numbers = statements
        .iter()
        .filter(|said| counts(said))
        .filter_map(Statement::int);
    let extreme = match why {
        Why::SmallerCounts => numbers.min(),
        _ => numbers.max(),
    };
    let Some(extreme) = extreme else { return };
    let deciding = statements
        .iter()
        .find(|said| counts(said) && said.int() == Some(extreme))
        .map_or(Source::Schema, |said| said.source);
    for said in statements {
        match (counts(said), said.int() == Some(extreme)) {
            (true, true) => one.resolved.origin.push(said.source),
            (true, false) => one.resolved.overrode.push(said.yields(deciding, why)),
            (false, _) => {
                let (to, why) = match (said.rank, locked) {
                    (Rank::Own, Some(lock)) => (lock, Why::Locked),
                    _ => (deciding, Why::OnlyDefault),
                };
                one.resolved.overrode.push(said.yields(to, why));
            }
        }
    }
    one.resolved.value = Some(Cow::Owned(Value::Int(extreme)));
}
