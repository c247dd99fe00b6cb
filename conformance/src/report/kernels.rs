//! What each kernel of attention takes on a device.

use fixtures::Dtype;
use ulysses::{DeviceChoice, Kernel};

use super::table;
use crate::implementation::Offer;

/// A table of kernels and element types, and a line of torch's own words for
/// each kernel that takes nothing.
pub fn kernels(choice: DeviceChoice, offers: &[(Kernel, Result<Vec<Offer>, String>)]) -> String {
    let dtypes = [Dtype::F64, Dtype::F32, Dtype::Bf16, Dtype::F16];
    let header = ["kernel".to_owned()]
        .into_iter()
        .chain(dtypes.map(|dtype| dtype.to_string()));
    let cell = |offers: &[Offer], dtype| {
        let takes = |is_grouped| {
            offers.iter().any(|offer| {
                offer.dtype == dtype && offer.is_grouped == is_grouped && offer.is_taken()
            })
        };
        match (takes(false), takes(true)) {
            (true, true) => "yes",
            (true, false) => "no groups",
            (false, _) => "no",
        }
    };
    let rows = offers.iter().map(|(kernel, offers)| {
        let offers = offers.as_deref().unwrap_or_default();
        let cells = dtypes.map(|dtype| cell(offers, dtype).to_owned());
        [kernel.name().to_owned()]
            .into_iter()
            .chain(cells)
            .collect()
    });
    let refusals = offers
        .iter()
        .filter_map(|(_, offers)| offers.as_ref().err());
    let refusals: String = refusals.map(|words| format!("{words}\n")).collect();
    format!(
        "What the kernels of `run --kernel` take on the device {choice}: element types, and KV \
         heads with\nseveral query heads.\n\n{}\n{refusals}",
        table(header, rows.collect(), 1..)
    )
}
