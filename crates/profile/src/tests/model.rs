//! Effective profiles against a reference that knows of a field only which values are still
//! possible, and takes the ranks one by one.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// A rule about the field `height`, whose values are 0 to 15.
#[derive(Debug, Clone)]
struct Said {
    priority: i32,
    operator: Operator,
    value: u64,
    locked: bool,
}

fn said() -> impl Strategy<Value = Said> {
    const OPERATORS: &[Operator] = &[
        Operator::Set,
        Operator::Default,
        Operator::Min,
        Operator::Max,
    ];
    let operator = proptest::sample::select(OPERATORS);
    let locked = proptest::bool::weighted(0.15);
    (0..4, operator, 0..16_u64, locked).prop_map(|(priority, operator, value, locked)| Said {
        priority,
        operator,
        value,
        locked: locked && operator != Operator::Default,
    })
}

fn profile(index: usize, said: &Said) -> Arc<Profile> {
    let locks = if said.locked {
        "locks = [\"height\"]\n"
    } else {
        ""
    };
    let text = format!(
        "name = \"p{index}\"\npriority = {}\n{locks}[{}]\nheight = {}\n",
        said.priority,
        said.operator.name(),
        said.value
    );
    read(&text, &format!("p{index}.toml"))
}

fn profiles(all: &[Said]) -> Vec<Arc<Profile>> {
    all.iter()
        .enumerate()
        .map(|(index, said)| profile(index, said))
        .collect()
}

/// How much it counts.
fn rank(said: &Said) -> (u8, i32) {
    match (said.locked, said.operator) {
        (true, _) => (4, 0),
        (_, Operator::Default) => (1, said.priority),
        _ => (2, said.priority),
    }
}

fn allows(said: &Said, n: u64) -> bool {
    match said.operator {
        Operator::Min => n >= said.value,
        Operator::Max => n <= said.value,
        _ => n == said.value,
    }
}

/// What holds, or none in a conflict.
fn reference(all: &[Said], own: Option<u64>) -> Option<u64> {
    walk(all, None)?;
    walk(all, own)
}

fn walk(all: &[Said], own: Option<u64>) -> Option<u64> {
    let mut ranks: BTreeSet<(u8, i32)> = all.iter().map(rank).collect();
    ranks.extend([(3, 0), (0, 0)]);
    let mut possible: BTreeSet<u64> = (0..16).collect();
    let mut decided = false;
    let nearest = |possible: &BTreeSet<u64>, n: u64| {
        possible
            .iter()
            .copied()
            .min_by_key(|known| known.abs_diff(n))
    };
    for at in ranks.into_iter().rev() {
        if matches!(at.0, 0 | 3) {
            let n = if at.0 == 0 { Some(5) } else { own };
            if let (Some(n), false) = (n, decided) {
                possible = [nearest(&possible, n)?].into();
                decided = true;
            }
            continue;
        }
        let is_value = |said: &&Said| matches!(said.operator, Operator::Set | Operator::Default);
        let group = all.iter().filter(|said| rank(said) == at);
        let (values, bounds): (Vec<&Said>, Vec<&Said>) = group.partition(is_value);
        // Bounds that nothing possible keeps: they have yielded, or, if locked, contradict a lock.
        let bounds: Vec<&Said> = bounds
            .into_iter()
            .filter(|said| possible.iter().any(|n| allows(said, *n)))
            .collect();
        let keep = |n: &u64| bounds.iter().all(|said| allows(said, *n));
        let bounded: BTreeSet<u64> = possible.iter().copied().filter(keep).collect();
        if bounded.is_empty() {
            return None;
        }
        let distinct: BTreeSet<u64> = values.iter().map(|said| said.value).collect();
        let Some(&n) = distinct.first().filter(|_| !decided) else {
            possible = bounded;
            continue;
        };
        if distinct.len() > 1 || !keep(&n) {
            return None;
        }
        possible = [nearest(&possible, n)?].into();
        decided = true;
    }
    possible.first().copied()
}

/// The value and everything that is told about it, with what must always hold checked.
fn resolve(profiles: Vec<Arc<Profile>>, own: Option<u64>) -> (Option<u64>, String) {
    let set = ProfileSet::new(schema(), profiles).unwrap();
    let mut object = tree("a", &[]);
    if let Some(own) = own {
        object = object.own(&schema(), "height", Value::Int(own));
    }
    let effective = set.effective(&object);
    let told = format!("{:?} {:?}", effective.values, effective.conflicts);
    let resolved = effective
        .resolved(&schema().slot("height").unwrap())
        .unwrap();
    let number = match resolved.value.as_deref() {
        Some(Value::Int(n)) => Some(*n),
        _ => None,
    };
    assert_eq!(number.is_none(), !effective.conflicts.is_empty());
    let Some(number) = number else {
        return (None, told);
    };
    assert!(!resolved.origin.is_empty());
    // Everybody who said something is in the account.
    for rule in effective.profiles.iter().flat_map(|profile| &profile.rules) {
        let source = Source::Rule(rule);
        let named = resolved.origin.contains(&source)
            || resolved.held.contains(&source)
            || resolved.overrode.iter().any(|gone| gone.source == source);
        assert!(named, "{rule} is not accounted for: {told}");
    }
    // No rule that is in force contradicts the value.
    for source in &resolved.held {
        let Source::Rule(rule) = source else {
            panic!("only rules bound")
        };
        let Operand::Value(Value::Int(bound)) = rule.operand else {
            panic!("a number")
        };
        match rule.operator {
            Operator::Min => assert!(number >= bound, "{told}"),
            Operator::Max => assert!(number <= bound, "{told}"),
            other => panic!("{other:?} is held"),
        }
    }
    (Some(number), told)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn the_value_is_that_of_the_reference(
        all in proptest::collection::vec(said(), 0..7),
        own in proptest::option::of(0..16_u64),
    ) {
        let (value, told) = resolve(profiles(&all), own);
        prop_assert_eq!(value, reference(&all, own), "{}", told);
    }

    #[test]
    fn the_order_of_the_input_says_nothing(
        (all, shuffled) in proptest::collection::vec(said(), 0..8).prop_flat_map(|all| {
            let profiles = profiles(&all);
            (Just(profiles.clone()), Just(profiles).prop_shuffle())
        }),
        own in proptest::option::of(0..16_u64),
    ) {
        prop_assert_eq!(resolve(all, own), resolve(shuffled, own));
    }

    /// Whoever decides the value goes on deciding it with a higher priority.
    #[test]
    fn a_higher_priority_never_loses_what_a_lower_had(
        mut all in proptest::collection::vec(said(), 1..7),
        own in proptest::option::of(0..16_u64),
    ) {
        all[0].operator = Operator::Set;
        let value = all[0].value;
        let (before, _) = resolve(profiles(&all), own);
        all[0].priority = 9;
        let (after, told) = resolve(profiles(&all), own);
        if before == Some(value) {
            prop_assert_eq!(after, Some(value), "{}", told);
        }
    }

    #[test]
    fn sets_and_extremes_are_what_a_plain_fold_makes_of_them(
        all in proptest::collection::vec((0..3_i32, 0..3_usize, 0..16_u64, 0..4_u8), 0..7),
    ) {
        let words = ["a", "b", "c"];
        let text = |(priority, word, n, what): &(i32, usize, u64, u8)| {
            let rule = match what {
                0 => format!("[add]\npests = \"{}\"", words[*word]),
                1 => format!("[forbid]\npests = \"{}\"", words[*word]),
                2 => format!("[set]\nsmallest = {n}"),
                _ => format!("[set]\nlargest = {n}"),
            };
            format!("priority = {priority}\n{rule}")
        };
        let texts: Vec<String> = all.iter().map(text).collect();
        let set = set(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let object = tree("a", &[]);
        let effective = set.effective(&object);
        prop_assert!(effective.conflicts.is_empty());
        let of = |what: u8| all.iter().filter(move |said| said.3 == what);
        let smallest = of(2).map(|said| said.2).min().map(Value::Int);
        prop_assert_eq!(value(&effective, "smallest"), smallest);
        let largest = of(3).map(|said| said.2).max().map(Value::Int);
        prop_assert_eq!(value(&effective, "largest"), largest);
        let named = |what: u8| of(what).map(|said| words[said.1].to_owned()).collect();
        let (added, denied): (BTreeSet<String>, BTreeSet<String>) = (named(0), named(1));
        let pests = (!added.is_empty()).then(|| Value::Set(&added - &denied));
        prop_assert_eq!(value(&effective, "pests"), pests);
    }

    /// The index finds what a comparison with every profile finds.
    #[test]
    fn the_index_leaves_nobody_out(
        selectors in proptest::collection::vec((0..4_u8, 0..3_usize, 0..3_usize), 0..12),
        name in 0..3_usize,
        age in proptest::option::of(0..3_usize),
        zone in proptest::option::of(0..3_usize),
    ) {
        let words = ["a", "b", "c"];
        let text = |(how, x, y): &(u8, usize, usize)| {
            let (x, y) = (words[*x], words[*y]);
            let selects = match how {
                0 => format!("name = \"{x}\""),
                1 => format!("labels.age = [\"{x}\", \"{y}\"]"),
                2 => format!("labels.age = \"{x}\"\nlabels.zone = \"{y}\""),
                _ => format!("name = \"*\"\nlabels.zone = {{ not-in = \"{x}\" }}"),
            };
            format!("priority = 1\n[match]\n{selects}")
        };
        let texts: Vec<String> = selectors.iter().map(text).collect();
        let set = set(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let mut of = Vec::new();
        of.extend(age.map(|value| ("age", words[value])));
        of.extend(zone.map(|value| ("zone", words[value])));
        let object = tree(words[name], &of);
        let found: Vec<&str> = set.matching(&object).iter().map(|found| found.name()).collect();
        let compared: Vec<&str> = set
            .profiles()
            .iter()
            .filter(|profile| profile.selector.selects(&object))
            .map(|profile| profile.name())
            .collect();
        prop_assert_eq!(found, compared);
    }
}
