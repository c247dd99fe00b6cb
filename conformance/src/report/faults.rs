//! What became of the faults: which were caught, and which were named.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::tables::table;
use crate::clause::Clause;
use crate::faults::{Fault, Tally};
use crate::rivals::{self, RIVALS};

/// A table of all faults, then a line for each answer that the judge let pass,
/// blamed without reason or took for another mistake, and the sums.
pub fn faults(tallies: &[Tally]) -> String {
    let header = [
        "fault",
        "class",
        "mistake",
        "clauses",
        "source",
        "wrong on",
        "caught",
        "named",
        "the judge says",
    ];
    let row = |tally: &Tally| {
        vec![
            tally.fault.name.to_owned(),
            tally.fault.class().name().to_owned(),
            tally.fault.mistake.name().to_owned(),
            clauses(tally.fault),
            tally.fault.source.unwrap_or_default().to_owned(),
            tally.wrong.to_string(),
            tally.caught.to_string(),
            tally.named.to_string(),
            first_sentence(&tally.sentence),
        ]
    };
    let mut text = table(header, tallies.iter().map(row).collect(), 5..8);
    for tally in tallies {
        let name = tally.fault.name;
        for (case, verdict) in &tally.missed {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "missed: {name} on {case}: {verdict}");
        }
        for (case, verdict) in &tally.false_alarms {
            let _ = writeln!(text, "not wrong: {name} on {case}: {verdict}");
        }
        let mut others: BTreeMap<_, Vec<String>> = BTreeMap::new();
        for (case, said) in &tally.misnamed {
            let said = said.unwrap_or("nothing");
            others.entry(said).or_default().push(case.to_string());
        }
        for (said, cases) in others {
            let (count, first) = (cases.len(), &cases[0]);
            let _ = writeln!(
                text,
                "named otherwise: {name} as {said} on {count}, first {first}"
            );
        }
    }
    text + "\n" + &sums(tallies)
}

/// The same as a page of Markdown, for people who ask whether the judge has
/// teeth.
pub fn faults_page(tallies: &[Tally]) -> String {
    let mut page = format!(
        "# Faults\n\n\
         Wrong implementations of Ulysses sequence parallelism, made of the reference's public parts, and\n\
         what the judge says of them. Written by `ulysses-conformance faults --table FILE`.\n\n\
         *Wrong on*: cases where the answer is not that of the right attention but for roundings,\n\
         which is found without the judge. *Caught*: on how many of these the judge fails it.\n\
         *Named*: on how many of these the diagnosis says the mistake. The last column is what it\n\
         says on the first of them. The clauses are those of [SPEC.md](SPEC.md).\n\n{}",
        sums(tallies)
    );
    let mut class = None;
    for tally in tallies {
        let fault = tally.fault;
        if class != Some(fault.class()) {
            class = Some(fault.class());
            let _ = write!(
                page,
                "\n## {}\n\n\
                 | fault | mistake | what a user sees | clauses | source | wrong on | caught | named | the judge says |\n\
                 |---|---|---|---|---|--:|--:|--:|---|\n",
                fault.class().name()
            );
        }
        let _ = writeln!(
            page,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            fault.name,
            fault.mistake.name(),
            fault.effect,
            clauses(fault),
            fault.source.unwrap_or_default(),
            tally.wrong,
            tally.caught,
            tally.named,
            first_sentence(&tally.sentence).replace('|', "\\|"),
        );
    }
    page
}

/// Who catches which fault, as a page of Markdown.
pub fn rivals_page(tally: &rivals::Tally) -> String {
    let mut page = format!(
        "# Other suites' rules on the same faults\n\n\
         The wrong answers of [FAULTS.md](FAULTS.md), judged by the acceptance rules that other\n\
         suites publish: of those that a rule has a say in, how many it refuses. Written by\n\
         `ulysses-conformance faults --rivals FILE`. Only the rules are compared: the inputs are\n\
         this suite's for all, and what a suite's own inputs hide comes on top. Answers after\n\
         others, under dropout and to bad input have no place here.\n\n{}\n",
        tally.table()
    );
    for rival in &RIVALS {
        let _ = writeln!(page, "- **{}**: {}", rival.name, rival.source);
    }
    page
}

fn sums(tallies: &[Tally]) -> String {
    let of = |count: fn(&Tally) -> usize| tallies.iter().map(count).sum::<usize>();
    let caught_faults = tallies.iter().filter(|tally| tally.is_caught()).count();
    format!(
        "{caught_faults} of {} faults are caught. They are wrong on {} of the {} answers that they gave; {} of\n\
         these are caught, and {} are named right; of {} faults the first that the judge says is right.\n",
        tallies.len(),
        of(|tally| tally.wrong),
        of(|tally| tally.tried),
        of(|tally| tally.caught),
        of(|tally| tally.named),
        of(|tally| usize::from(tally.is_first_named)),
    )
}

/// The clauses that a fault breaks: `G1, G4`.
fn clauses(fault: &Fault) -> String {
    let clauses = Clause::of_mistake(fault.mistake).iter();
    let ids: Vec<&str> = clauses.map(|clause| clause.id()).collect();
    ids.join(", ")
}

/// Up to the first full stop that ends a sentence, in one line.
fn first_sentence(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let end = line.find(". ").map_or(line.len(), |end| end + 1);
    line[..end].to_owned()
}
