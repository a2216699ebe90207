//! Drawings as PNG.

use tiny_skia::{FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, StrokeDash, Transform};
use ttf_parser::Face;

use super::drawing::{Drawing, Ink, Label, Mark, Sheet, VectorPath};
use super::font::glyphs;

/// The size of the PNG of a drawing, in pixels.
pub(super) fn size(drawing: &Drawing, sheet: &Sheet) -> [f64; 2] {
    [drawing.width, drawing.height].map(|length| (length * scale(sheet)).round().max(1.0))
}

/// Pixels per unit of a drawing.
fn scale(sheet: &Sheet) -> f64 {
    sheet.scale * sheet.dpi / 96.0
}

/// # Errors
/// Too little memory for the pixels.
pub(super) fn png(drawing: &Drawing, sheet: &Sheet) -> std::io::Result<Vec<u8>> {
    let [width, height] = size(drawing, sheet).map(|pixels| pixels as u32);
    let mut pixmap = Pixmap::new(width, height).ok_or(std::io::ErrorKind::OutOfMemory)?;
    if !sheet.transparent {
        pixmap.fill(tiny_skia::Color::WHITE);
    }
    let face = sheet.font.face()?;
    let to_pixels = Transform::from_scale(scale(sheet) as f32, scale(sheet) as f32);
    for mark in &drawing.marks {
        match mark {
            Mark::Shape(shape) => paint_shape(shape, &mut pixmap, to_pixels),
            Mark::Label(label) => paint_label(label, &face, &mut pixmap, to_pixels),
        }
    }
    Ok(with_resolution(pixmap.encode_png().map_err(std::io::Error::other)?, sheet.dpi))
}

/// Adds the resolution, from which a program that sets type takes the size on paper.
fn with_resolution(mut png: Vec<u8>, dpi: f64) -> Vec<u8> {
    // The signature and the header come first, and are of fixed length.
    const BEFORE: usize = 8 + 25;
    let per_metre = ((dpi / 0.0254).round() as u32).to_be_bytes();
    // The unit 1 is the metre.
    let chunk = [&b"pHYs"[..], &per_metre, &per_metre, &[1]].concat();
    let mut sum = flate2::Crc::new();
    sum.update(&chunk);
    let whole = [&9u32.to_be_bytes()[..], &chunk, &sum.sum().to_be_bytes()].concat();
    png.splice(BEFORE..BEFORE, whole);
    png
}

fn paint(ink: Ink) -> Paint<'static> {
    let [r, g, b] = ink.rgb();
    let mut paint = Paint::default();
    paint.set_color_rgba8(r, g, b, (255.0 * ink.opacity()).round() as u8);
    paint
}

fn path(shape: &VectorPath) -> Option<Path> {
    let mut builder = PathBuilder::new();
    for path in &shape.paths {
        for (index, &[x, y]) in path.iter().enumerate() {
            match index {
                0 => builder.move_to(x as f32, y as f32),
                _ => builder.line_to(x as f32, y as f32),
            }
        }
        if shape.closed {
            builder.close();
        }
    }
    builder.finish()
}

fn paint_shape(shape: &VectorPath, pixmap: &mut Pixmap, to_pixels: Transform) {
    let Some(path) = path(shape) else { return };
    if let Some(ink) = shape.fill {
        pixmap.fill_path(&path, &paint(ink), FillRule::Winding, to_pixels, None);
    }
    if let Some((ink, width)) = shape.stroke {
        let dash = shape.dash.iter().map(|&length| length as f32).collect();
        let stroke = tiny_skia::Stroke {
            width: width as f32,
            line_cap: LineCap::Butt,
            line_join: LineJoin::Round,
            dash: StrokeDash::new(dash, 0.0),
            ..tiny_skia::Stroke::default()
        };
        pixmap.stroke_path(&path, &paint(ink), &stroke, to_pixels, None);
    }
}

fn paint_label(label: &Label, face: &Face<'_>, pixmap: &mut Pixmap, to_pixels: Transform) {
    let scale = label.size / f64::from(face.units_per_em());
    let mut outline = Outline { builder: PathBuilder::new(), scale, pen: 0.0 };
    for placed in glyphs(face, label) {
        outline.pen = placed.pen;
        face.outline_glyph(placed.glyph, &mut outline);
    }
    let Some(path) = outline.builder.finish() else { return };
    let [x, y] = label.at.map(|coordinate| coordinate as f32);
    let turn = if label.vertical { Transform::from_rotate(-90.0) } else { Transform::identity() };
    let place = turn.post_translate(x, y).post_concat(to_pixels);
    pixmap.fill_path(&path, &paint(label.ink), FillRule::Winding, place, None);
}

/// Collects the outlines of glyphs, with the position of the next glyph.
struct Outline {
    builder: PathBuilder,
    scale: f64,
    pen: f64,
}

impl Outline {
    fn at(&self, x: f32, y: f32) -> (f32, f32) {
        ((self.pen + f64::from(x) * self.scale) as f32, (-f64::from(y) * self.scale) as f32)
    }
}

impl ttf_parser::OutlineBuilder for Outline {
    fn move_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.builder.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.builder.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let ((x1, y1), (x, y)) = (self.at(x1, y1), self.at(x, y));
        self.builder.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let ((x1, y1), (x2, y2), (x, y)) = (self.at(x1, y1), self.at(x2, y2), self.at(x, y));
        self.builder.cubic_to(x1, y1, x2, y2, x, y);
    }

    fn close(&mut self) {
        self.builder.close();
    }
}
