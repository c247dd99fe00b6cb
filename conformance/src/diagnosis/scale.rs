//! Whether what is wrong is what is right times a factor, and which.

use super::Diagnosis;
use super::evidence::{Evidence, Measured};
use super::prediction::rms;

/// What may remain of an answer that is a multiple of the right one, relative
/// to it.
const REMAINS: f64 = 0.03;

/// The factors, where every wrong tensor is a multiple of the right one, as a
/// whole or head by head.
pub(super) fn recognise(evidence: &Evidence<'_>, contrast: &str) -> Option<Diagnosis> {
    let wrong = || evidence.tensors.iter().filter(|tensor| tensor.is_wrong());
    let told: Option<Vec<String>> = wrong().map(|tensor| told(evidence, tensor)).collect();
    let told = told.filter(|told| !told.is_empty())?;
    Some(Diagnosis {
        mistake: None,
        others: Vec::new(),
        strip: Vec::new(),
        confidence: 0.5,
        sentence: format!("{contrast} {}.", told.join("; ")),
    })
}

/// By what a tensor is multiplied; or, if that differs, each of its heads.
fn told(evidence: &Evidence<'_>, tensor: &Measured<'_>) -> Option<String> {
    let name = tensor.name.name();
    if let Some(factor) = factor(tensor, |_| true) {
        let of_ranks = in_ranks(factor, evidence.ranks());
        return Some(format!(
            "{name} is {factor:.4} times the right one{of_ranks}"
        ));
    }
    let factors: Option<Vec<String>> = (0..tensor.sizes.heads)
        .map(|head| factor(tensor, |row| tensor.sizes.place(row).2 == head))
        .map(|factor| factor.map(|factor| format!("{factor:.3}")))
        .collect();
    Some(format!(
        "{name} is the right one times, head by head, {}",
        factors?.join(" ")
    ))
}

/// How a factor has to do with the number of ranks.
fn in_ranks(factor: f64, ranks: usize) -> String {
    let p = ranks as f64;
    let known = [
        (p, "P"),
        (1.0 / p, "1/P"),
        (p * p, "P^2"),
        (1.0 / (p * p), "1/P^2"),
        (p.sqrt(), "sqrt P"),
        (1.0 / p.sqrt(), "1/sqrt P"),
    ];
    let near = |(value, _): &&(f64, &str)| (factor / value - 1.0).abs() < REMAINS;
    match known.iter().find(near) {
        Some((_, name)) if ranks > 1 => format!(", {name} with P = {ranks}"),
        _ => String::new(),
    }
}

/// The factor of these rows, if they are a multiple of the right ones.
fn factor(tensor: &Measured<'_>, is_counted: impl Fn(usize) -> bool) -> Option<f64> {
    let places: Vec<usize> = (0..tensor.sizes.rows())
        .filter(|&row| is_counted(row))
        .flat_map(|row| tensor.row(row))
        .collect();
    let sum = |of: &dyn Fn(usize) -> f64| places.iter().map(|&i| of(i)).sum::<f64>();
    let squares = sum(&|i| tensor.right[i] * tensor.right[i]);
    let factor = sum(&|i| tensor.right[i] * tensor.answer[i]) / squares;
    let size = rms(places.iter().map(|&i| factor * tensor.right[i]));
    let rest = rms(places
        .iter()
        .map(|&i| tensor.answer[i] - factor * tensor.right[i]));
    (factor.is_finite() && size > 0.0 && rest <= REMAINS * size).then_some(factor)
}
