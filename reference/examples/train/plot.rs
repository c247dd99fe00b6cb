//! Two curves that lie on one another, and below how far they are apart.

use super::{Result, compare::Compared};
use plotters::{
    coord::{CoordTranslate, Shift},
    prelude::*,
};
use std::path::Path;

const SIZE: (u32, u32) = (900, 660);
const UPPER: u32 = 380;
const FONT: &str = "sans-serif";
const ONE: RGBColor = RGBColor(158, 202, 225);
const MESH: RGBColor = RGBColor(8, 48, 107);
const TOLERANCE: RGBColor = RGBColor(203, 24, 29);

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws `steps` as SVG.
pub(crate) fn draw(path: &Path, caption: &str, mesh: &str, steps: &[Compared]) -> Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(UPPER);
    losses(&upper, caption, mesh, steps)?;
    differences(&lower, steps)?;
    root.present()?;
    Ok(())
}

fn losses(panel: &Panel<'_>, caption: &str, mesh: &str, steps: &[Compared]) -> Result<()> {
    let (low, high) = bounds(steps.iter().flat_map(|step| [step.one, step.mesh]));
    let mut chart = ChartBuilder::on(panel)
        .caption(caption, (FONT, 18))
        .margin(12)
        .x_label_area_size(24)
        .y_label_area_size(70)
        .build_cartesian_2d(0..steps.len() as u32, low.floor()..high)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .y_desc("loss, nats per byte")
        .draw()?;
    let one: Vec<f64> = steps.iter().map(|step| step.one).collect();
    let both = steps.iter().map(|step| step.mesh).collect();
    let curves = [
        ("one process", one, ONE.stroke_width(7)),
        (mesh, both, MESH.stroke_width(2)),
    ];
    for (name, losses, style) in curves {
        chart
            .draw_series(LineSeries::new((0..).zip(losses), style))?
            .label(name)
            .legend(move |at| dash(at, style));
    }
    legend(&mut chart)
}

/// On a scale of powers, on which zero has no place: where there is no
/// difference, a hollow mark stands on the axis.
fn differences(panel: &Panel<'_>, steps: &[Compared]) -> Result<()> {
    let numbered = || (0u32..).zip(steps);
    let tolerances = numbered().map(|(x, step)| (x, step.tolerance));
    let apart = numbered().map(|(x, step)| (x, step.difference()));
    let (equal, apart): (Vec<_>, Vec<_>) = apart.partition(|point| point.1 == 0.0);
    let both = apart.iter().copied().chain(tolerances.clone());
    let (low, high) = bounds(both.map(|point| point.1));
    let (low, high) = (low / 10.0, high * 1000.0);
    let mut chart = ChartBuilder::on(panel)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(70)
        .build_cartesian_2d(0..steps.len() as u32, (low..high).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("step")
        .y_desc("difference")
        .y_label_formatter(&|y| format!("{y:.0e}"))
        .draw()?;
    let red = TOLERANCE.stroke_width(2);
    chart
        .draw_series(LineSeries::new(tolerances, red))?
        .label("tolerance")
        .legend(move |at| dash(at, red));
    let marks = [
        ("difference", apart, MESH.filled()),
        ("no difference", equal, MESH.stroke_width(1)),
    ];
    for (name, points, style) in marks {
        let place = |(x, y): (u32, f64)| Circle::new((x, y.max(low)), 2, style);
        chart
            .draw_series(points.into_iter().map(place))?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 12, y), 2, style));
    }
    legend(&mut chart)
}

/// The least and the greatest; none of them is below zero.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let values = values.filter(|value| value.is_finite());
    values.fold((f64::INFINITY, 0.0), |(low, high), value| {
        (value.min(low), value.max(high))
    })
}

fn dash((x, y): (i32, i32), style: ShapeStyle) -> PathElement<(i32, i32)> {
    PathElement::new([(x, y), (x + 24, y)], style)
}

fn legend<'a, B, T>(chart: &mut ChartContext<'a, B, T>) -> Result<()>
where
    B: DrawingBackend + 'a,
    B::ErrorType: 'static,
    T: CoordTranslate,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .legend_area_size(34)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 13))
        .draw()?;
    Ok(())
}
