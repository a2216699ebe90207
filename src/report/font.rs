//! The fonts of pictures: three that the program brings, and any file of a TrueType or OpenType font.

use std::borrow::Cow;
use std::path::Path;

use ttf_parser::{Face, GlyphId, name_id};

use super::drawing::{Anchor, Label};
use super::text::plain;
use crate::train::{TrainError, read_regular};

/// The most bytes of a file of a font.
const MOST_BYTES: u64 = 1 << 26;

/// A font that could be read.
pub(super) struct Font {
    pub bytes: Cow<'static, [u8]>,
    /// The family in CSS, with others that a viewer may have instead.
    pub css: String,
}

/// A glyph and its distance from the start of its line.
pub(super) struct Placed {
    pub glyph: GlyphId,
    pub character: char,
    pub pen: f64,
}

impl Font {
    /// What a font can be called.
    const EXPECTED: &str = "expected sans, serif, mono, or a file of a TrueType or OpenType font";

    /// The font of this name or in this file.
    ///
    /// # Errors
    /// [`TrainError::Setting`] for `font`.
    pub fn find(name: &str) -> Result<Self, TrainError> {
        let known = match name {
            "sans" => Some((dejavu::sans::regular(), "DejaVu Sans, Verdana, sans-serif")),
            "serif" => Some((dejavu::serif::regular(), "DejaVu Serif, Georgia, serif")),
            "mono" => Some((dejavu::sans_mono::regular(), "DejaVu Sans Mono, Menlo, monospace")),
            _ => None,
        };
        if let Some((bytes, css)) = known {
            return Ok(Self { bytes: bytes.into(), css: css.into() });
        }
        let unusable = |reason: String| TrainError::setting("font", format!("{name}: {reason}; {}", Self::EXPECTED));
        let bytes = read_regular(Path::new(name), MOST_BYTES).map_err(|error| match error {
            TrainError::Io { source, .. } => unusable(source.to_string()),
            _ => unusable("not a file of a font".into()),
        })?;
        let face = Face::parse(&bytes, 0).map_err(|error| unusable(error.to_string()))?;
        let family = name_of(&face, name_id::FAMILY).map(|family| plain(&family.replace(['\'', '"', '\\'], "")));
        let css = format!("'{}', sans-serif", family.unwrap_or_else(|| "unnamed".into()));
        Ok(Self { css, bytes: bytes.into() })
    }

    /// # Errors
    /// A file that is damaged.
    pub fn face(&self) -> std::io::Result<Face<'_>> {
        Face::parse(&self.bytes, 0).map_err(std::io::Error::other)
    }

    /// The width of a text.
    pub fn width(&self, text: &str, size: f64) -> f64 {
        self.face().map_or(0.0, |face| line(&face, text, size).1)
    }
}

/// A name in the font's own table of names.
pub(super) fn name_of(face: &Face<'_>, id: u16) -> Option<String> {
    face.names().into_iter().filter(|name| name.name_id == id).find_map(|name| name.to_string())
}

/// The glyphs of a text and its width.
fn line(face: &Face<'_>, text: &str, size: f64) -> (Vec<Placed>, f64) {
    let scale = size / f64::from(face.units_per_em());
    let (mut placed, mut pen) = (Vec::new(), 0.0);
    for character in text.chars() {
        let glyph = face.glyph_index(character).unwrap_or_default();
        placed.push(Placed { glyph, character, pen });
        pen += f64::from(face.glyph_hor_advance(glyph).unwrap_or_default()) * scale;
    }
    (placed, pen)
}

/// The glyphs of a label, at their distances from its place.
pub(super) fn glyphs(face: &Face<'_>, label: &Label) -> Vec<Placed> {
    let (mut placed, width) = line(face, &label.text, label.size);
    let start = match label.anchor {
        Anchor::Start => 0.0,
        Anchor::Middle => -0.5 * width,
        Anchor::End => -width,
    };
    placed.iter_mut().for_each(|placed| placed.pen += start);
    placed
}
