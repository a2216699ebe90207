//! Drawings as PDF of one page, with lines as lines and text as text in an embedded part of the font.

use std::collections::BTreeMap;
use std::io::Write;

use pdf_writer::types::{CidFontType, FontFlags, LineJoinStyle, SystemInfo, UnicodeCmap};
use pdf_writer::{Content, Filter, Finish, Name, Pdf, Rect, Ref, Str, TextStr};
use subsetter::GlyphRemapper;
use ttf_parser::{Face, RawFace, Tag, name_id};

use super::drawing::{Drawing, Ink, Label, Mark, Sheet, VectorPath};
use super::font::{glyphs, name_of};

/// Points, of which an inch has 72, per pixel of CSS.
const POINTS: f64 = 0.75;

const CATALOG: Ref = Ref::new(1);
const PAGES: Ref = Ref::new(2);
const PAGE: Ref = Ref::new(3);
const CONTENT: Ref = Ref::new(4);
const FONT: Ref = Ref::new(5);
const CID_FONT: Ref = Ref::new(6);
const DESCRIPTOR: Ref = Ref::new(7);
const FONT_FILE: Ref = Ref::new(8);
const CMAP: Ref = Ref::new(9);
const INFO: Ref = Ref::new(10);

const SYSTEM: SystemInfo<'static> = SystemInfo { registry: Str(b"Adobe"), ordering: Str(b"Identity"), supplement: 0 };

/// The marks of a page, and what they use.
struct Page<'a> {
    content: Content,
    face: Face<'a>,
    /// The glyphs in the order of their use, which is their order in the embedded font.
    glyphs: GlyphRemapper,
    /// The advance of each embedded glyph in thousandths of the size, and its character.
    used: BTreeMap<u16, (f32, Option<char>)>,
    /// Opacities in thousandths.
    opacities: Vec<u32>,
}

/// # Errors
/// A font of a kind that cannot be embedded.
pub(super) fn pdf(drawing: &Drawing, sheet: &Sheet) -> std::io::Result<Vec<u8>> {
    let scale = sheet.scale * POINTS;
    let [width, height] = [drawing.width, drawing.height].map(|length| (length * scale) as f32);
    let mut page = Page {
        content: Content::new(),
        face: sheet.font.face()?,
        glyphs: GlyphRemapper::new(),
        used: BTreeMap::from([(0, (0.0, None))]),
        opacities: Vec::new(),
    };
    if !sheet.transparent {
        page.content.set_fill_rgb(1.0, 1.0, 1.0).rect(0.0, 0.0, width, height).fill_nonzero();
    }
    // A drawing has its origin at the top.
    page.content.transform([scale as f32, 0.0, 0.0, -scale as f32, 0.0, height]);
    page.content.set_line_join(LineJoinStyle::RoundJoin);
    for mark in &drawing.marks {
        match mark {
            Mark::Shape(shape) => page.shape(shape),
            Mark::Label(label) => page.label(label),
        }
    }
    let mut pdf = Pdf::new();
    pdf.catalog(CATALOG).pages(PAGES);
    pdf.pages(PAGES).kids([PAGE]).count(1);
    pdf.document_info(INFO).title(TextStr(&drawing.title)).producer(TextStr("polder"));
    let mut dictionary = pdf.page(PAGE);
    dictionary.media_box(Rect::new(0.0, 0.0, width, height)).parent(PAGES).contents(CONTENT);
    let mut resources = dictionary.resources();
    resources.fonts().pair(Name(b"F"), FONT);
    let mut states = resources.ext_g_states();
    for &opacity in &page.opacities {
        let alpha = opacity as f32 / 1000.0;
        let name = state_name(opacity);
        let mut state = states.insert(Name(name.as_bytes())).start::<pdf_writer::writers::ExtGraphicsState>();
        state.stroking_alpha(alpha).non_stroking_alpha(alpha);
    }
    states.finish();
    resources.finish();
    dictionary.finish();
    page.embed(&mut pdf, &sheet.font.bytes)?;
    let content = compressed(page.content.finish().as_slice())?;
    pdf.stream(CONTENT, &content).filter(Filter::FlateDecode);
    Ok(pdf.finish())
}

fn compressed(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes)?;
    encoder.finish()
}

fn state_name(opacity: u32) -> String {
    format!("O{opacity}")
}

impl Page<'_> {
    fn opacity(&mut self, ink: Ink) {
        let opacity = (1000.0 * ink.opacity()).round() as u32;
        if !self.opacities.contains(&opacity) {
            self.opacities.push(opacity);
        }
        self.content.set_parameters(Name(state_name(opacity).as_bytes()));
    }

    fn fill_ink(&mut self, ink: Ink) {
        self.opacity(ink);
        let [r, g, b] = ink.rgb().map(|channel| f32::from(channel) / 255.0);
        self.content.set_fill_rgb(r, g, b);
    }

    fn outline(&mut self, shape: &VectorPath) {
        for path in shape.paths.iter().filter(|path| !path.is_empty()) {
            for (index, point) in path.iter().enumerate() {
                // Hundredths of a unit are enough, and make the file smaller.
                let [x, y] = point.map(|coordinate| ((100.0 * coordinate).round() / 100.0) as f32);
                if index == 0 {
                    self.content.move_to(x, y)
                } else {
                    self.content.line_to(x, y)
                };
            }
            if shape.closed {
                self.content.close_path();
            }
        }
    }

    fn shape(&mut self, shape: &VectorPath) {
        if let Some(ink) = shape.fill {
            self.fill_ink(ink);
            self.outline(shape);
            self.content.fill_nonzero();
        }
        if let Some((ink, width)) = shape.stroke {
            self.opacity(ink);
            let [r, g, b] = ink.rgb().map(|channel| f32::from(channel) / 255.0);
            self.content.set_stroke_rgb(r, g, b).set_line_width(width as f32);
            self.content.set_dash_pattern(shape.dash.iter().map(|&length| length as f32), 0.0);
            self.outline(shape);
            self.content.stroke();
        }
    }

    fn label(&mut self, label: &Label) {
        self.fill_ink(label.ink);
        let placed = glyphs(&self.face, label);
        let Some(first) = placed.first() else { return };
        let ([x, y], pen) = (label.at.map(|coordinate| coordinate as f32), first.pen as f32);
        let per_em = 1000.0 / f32::from(self.face.units_per_em());
        let mut text = Vec::new();
        for glyph in &placed {
            let id = self.glyphs.remap(glyph.glyph.0);
            let advance = per_em * f32::from(self.face.glyph_hor_advance(glyph.glyph).unwrap_or_default());
            // The glyph of characters that the font lacks stands for none of them.
            let character = (glyph.glyph.0 != 0).then_some(glyph.character);
            self.used.entry(id).and_modify(|used| used.0 = advance).or_insert((advance, character));
            text.extend(id.to_be_bytes());
        }
        let place = if label.vertical { [0.0, -1.0, -1.0, 0.0, x, y - pen] } else { [1.0, 0.0, 0.0, -1.0, x + pen, y] };
        self.content.begin_text().set_font(Name(b"F"), label.size as f32).set_text_matrix(place);
        self.content.show(Str(&text)).end_text();
    }

    /// Writes the glyphs in use as a font, with the characters that they stand for.
    fn embed(&self, pdf: &mut Pdf, font: &[u8]) -> std::io::Result<()> {
        let refused = |error: subsetter::Error| std::io::Error::other(format!("cannot be embedded in PDF: {error}"));
        let part = subsetter::subset(font, 0, &self.glyphs).map_err(refused)?;
        // Of a font with the outlines of PostScript, their table alone.
        let outlines = RawFace::parse(&part, 0).ok().and_then(|raw| raw.table(Tag::from_bytes(b"CFF ")));
        let name = name_of(&self.face, name_id::POST_SCRIPT_NAME).unwrap_or_default();
        let name: String = name.chars().filter(|&letter| letter.is_ascii_alphanumeric() || letter == '-').collect();
        // Six letters mark a part of a font.
        let name = format!("POLDER+{name}");
        let name = Name(name.as_bytes());
        let kind = if outlines.is_some() { CidFontType::Type0 } else { CidFontType::Type2 };
        let per_em = 1000.0 / f32::from(self.face.units_per_em());

        let mut cmap = UnicodeCmap::new(Name(b"Custom"), SYSTEM);
        for (&glyph, (_, character)) in &self.used {
            if let Some(character) = character {
                cmap.pair(glyph, *character);
            }
        }
        pdf.cmap(CMAP, &compressed(cmap.finish().as_slice())?).filter(Filter::FlateDecode);
        let mut composite = pdf.type0_font(FONT);
        composite.base_font(name).encoding_predefined(Name(b"Identity-H")).descendant_font(CID_FONT).to_unicode(CMAP);
        composite.finish();
        let mut glyphs = pdf.cid_font(CID_FONT);
        glyphs.subtype(kind).base_font(name).system_info(SYSTEM).font_descriptor(DESCRIPTOR);
        if outlines.is_none() {
            glyphs.cid_to_gid_map_predefined(Name(b"Identity"));
        }
        glyphs.widths().consecutive(0, self.used.values().map(|(advance, _)| *advance));
        glyphs.finish();
        let bounds = self.face.global_bounding_box();
        let [left, bottom, right, top] =
            [bounds.x_min, bounds.y_min, bounds.x_max, bounds.y_max].map(|end| per_em * f32::from(end));
        let mut descriptor = pdf.font_descriptor(DESCRIPTOR);
        descriptor.name(name).flags(FontFlags::SYMBOLIC).bbox(Rect::new(left, bottom, right, top));
        descriptor.italic_angle(0.0).stem_v(80.0);
        descriptor.ascent(per_em * f32::from(self.face.ascender()));
        descriptor.descent(per_em * f32::from(self.face.descender()));
        descriptor.cap_height(per_em * f32::from(self.face.capital_height().unwrap_or(self.face.ascender())));
        if outlines.is_some() {
            descriptor.font_file3(FONT_FILE)
        } else {
            descriptor.font_file2(FONT_FILE)
        };
        descriptor.finish();
        let file = compressed(outlines.unwrap_or(&part))?;
        let mut stream = pdf.stream(FONT_FILE, &file);
        if outlines.is_some() {
            stream.pair(Name(b"Subtype"), Name(b"CIDFontType0C"));
        } else {
            stream.pair(Name(b"Length1"), part.len() as i32);
        }
        stream.filter(Filter::FlateDecode);
        Ok(())
    }
}
