//! What all ranks know of an optimizer before it begins.

use super::Options;
use crate::{
    communicator::Communicator,
    error::{Refusal, Result, refuse},
};
use tch::{Kind, Tensor};

const FLOATS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half];

/// The words of one parameter, and what it means that they differ.
const WORDS: [&str; 5] = [
    "another dtype",
    "another shape",
    "another choice of what is frozen",
    "other values",
    // Whatever it is the copy of is the same where all else is.
    "another sharing",
];

/// Gathers every rank's options and parameters and judges them, the same way on
/// every rank.
pub(super) fn reach(
    world: &dyn Communicator,
    parameters: &[Tensor],
    options: &Options,
) -> Result<()> {
    let gathered = world.all_gather(&settings(parameters.len(), options))?;
    if let Some(rank) = gathered.iter().position(|words| words != &gathered[0]) {
        let (argument, problem) = if gathered[rank][0] == gathered[0][0] {
            ("options", "are not those of rank 0".to_owned())
        } else {
            let [own, due] = [&gathered[rank], &gathered[0]].map(|words| words[0]);
            let problem = format!("has {own} parameters, but that of rank 0 has {due}");
            ("parameters", problem)
        };
        return refused(rank, argument, problem, "give every rank the same");
    }
    options.check()?;

    let own = describe(parameters)?;
    let gathered = world.all_gather(&own)?;
    let described = || {
        gathered.iter().enumerate().flat_map(|(rank, words)| {
            let parameters = words.chunks_exact(WORDS.len()).enumerate();
            parameters.map(move |(position, words)| (rank, position, words))
        })
    };
    for (rank, position, words) in described() {
        if words[0] < 0 {
            let problem = format!("has no leaf of floating point at position {position}");
            let remedy = "give parameters that no operation has made";
            return refused(rank, "parameters", problem, remedy);
        }
        if words[4] != position as i64 {
            let problem = format!("has one tensor at positions {} and {position}", words[4]);
            return refused(rank, "parameters", problem, "give each parameter once");
        }
    }
    for (rank, position, words) in described() {
        let first = &gathered[0][position * WORDS.len()..][..WORDS.len()];
        if let Some(word) = (0..WORDS.len()).find(|&word| words[word] != first[word]) {
            let what = WORDS[word];
            let problem = format!("has {what} at position {position} than that of rank 0");
            return refused(
                rank,
                "parameters",
                problem,
                "begin with the same on every rank",
            );
        }
    }
    Ok(())
}

fn settings(parameters: usize, options: &Options) -> Vec<i64> {
    let bits = |number: f64| number.to_bits().cast_signed();
    let (update, numbers) = options.update.numbers();
    let mut words = vec![
        parameters as i64,
        options.stage as i64,
        options.state as i64,
        update,
        bits(options.scale.divisor(1)),
        bits(options.scale.divisor(2)),
        options.clip.is_some().into(),
        bits(options.clip.unwrap_or(0.0)),
    ];
    words.extend(numbers.map(|(_, number)| bits(number)));
    words
}

fn describe(parameters: &[Tensor]) -> Result<Vec<i64>> {
    let mut words = Vec::with_capacity(parameters.len() * WORDS.len());
    let defined = |parameter: &Tensor| parameter.defined().then(|| parameter.data_ptr());
    let places: Vec<_> = parameters.iter().map(defined).collect();
    for (position, parameter) in parameters.iter().enumerate() {
        let kind = FLOATS
            .iter()
            .position(|&kind| parameter.f_kind().is_ok_and(|own| own == kind));
        let Some(kind) = kind.filter(|_| parameter.f_is_leaf().is_ok_and(|leaf| leaf)) else {
            words.extend([-1, 0, 0, 0, position as i64]);
            continue;
        };
        let first = places
            .iter()
            .position(|&place| place == Some(parameter.data_ptr()));
        words.extend([
            kind as i64,
            digest(&parameter.size()),
            parameter.requires_grad().into(),
            bits_of(parameter)?,
            first.filter(|_| parameter.numel() > 0).unwrap_or(position) as i64,
        ]);
    }
    Ok(words)
}

/// The sum of a tensor's bits as whole numbers: other values have another, all
/// but surely.
fn bits_of(tensor: &Tensor) -> Result<i64> {
    let kind = match tensor.f_kind()? {
        Kind::Double => Kind::Int64,
        Kind::Float => Kind::Int,
        _ => Kind::Int16,
    };
    let bits = tensor.f_detach()?.f_contiguous()?.f_view_dtype(kind)?;
    Ok(bits.f_sum(Kind::Int64)?.f_int64_value(&[])?)
}

/// A few bits of all sizes: FNV-1a, by words.
fn digest(sizes: &[i64]) -> i64 {
    let fold = |digest: i64, &word: &i64| (digest ^ word).wrapping_mul(0x100_0000_01b3);
    sizes.iter().fold(0x4bf2_9ce4_8422_2325, fold)
}

fn refused(rank: usize, argument: &'static str, problem: String, remedy: &str) -> Result<()> {
    Err(Refusal {
        rank: Some(rank),
        argument,
        problem,
        remedy: remedy.to_owned(),
    }
    .into())
}

impl Options {
    fn check(&self) -> Result<()> {
        self.update.check()?;
        for (name, number) in [
            ("a divisor of gradients of", Some(self.scale.divisor(1))),
            ("a norm to clip to of", self.clip),
        ] {
            if let Some(number) = number.filter(|number| !(number.is_finite() && *number > 0.0)) {
                return refuse(
                    "options",
                    format!("has {name} {number}"),
                    "give a finite number above zero",
                );
            }
        }
        Ok(())
    }
}
