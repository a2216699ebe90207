// Reads PTX as nvcc writes it for these kernels: entries with one parameter, no functions, no local memory. At anything
// unknown, the process ends with the line.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <set>

#include "ptx.hpp"

namespace {

std::string trimmed(const std::string& text) {
    const size_t begin = text.find_first_not_of(" \t\n"), end = text.find_last_not_of(" \t\n");
    return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

/// The parts between separators. Commas inside brackets do not separate.
std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (const char c : text) {
        depth += c == '{' || c == '[' ? 1 : c == '}' || c == ']' ? -1 : 0;
        if (c == separator && depth == 0) {
            parts.push_back(trimmed(part));
            part.clear();
        } else {
            part += c;
        }
    }
    if (!trimmed(part).empty()) parts.push_back(trimmed(part));
    return parts;
}

/// `a, b` of `{a, b}`, or the text itself.
std::vector<std::string> vector_of(const std::string& text) {
    return text[0] == '{' ? split(text.substr(1, text.size() - 2), ',') : std::vector<std::string>{text};
}

bool begins_with(const std::string& text, const char* what) { return text.compare(0, strlen(what), what) == 0; }

/// Bytes of a type, such as `u32`; 1 for a predicate.
int bytes_of(const std::string& type) {
    if (type == "pred") return 1;
    return atoi(type.c_str() + type.find_first_of("0123456789")) / 8;
}

/// A variable as it is declared: `.shared .align 16 .b8 name[64]`.
struct Variable {
    std::string name;
    uint32_t alignment = 1, bytes = 0;

    explicit Variable(const std::string& declaration) {
        if (const size_t at = declaration.find(".align"); at != std::string::npos)
            alignment = atoi(declaration.c_str() + at + 6);
        const size_t bracket = declaration.find('['), end = std::min(bracket, declaration.size());
        const size_t begin = declaration.find_last_of(" \t\n", end) + 1;
        name = trimmed(declaration.substr(begin, end - begin));
        const std::string before = trimmed(declaration.substr(0, begin));
        const uint32_t size = bytes_of(before.substr(before.rfind('.') + 1));
        bytes = size * (bracket == std::string::npos ? 1 : atoi(declaration.c_str() + bracket + 1));
        alignment = std::max(alignment, size);
    }
    /// Its offset after the previous variables of its kind, whose size it increases.
    uint32_t place(uint32_t& total) const {
        const uint32_t at = (total + alignment - 1) / alignment * alignment;
        total = at + bytes;
        return at;
    }
};

class Parser {
public:
    Parser(const std::string& text, std::string source) : text_(text), source_(std::move(source)) {}

    Kernels run() {
        std::string statement;
        while (at_ < text_.size()) {
            const char c = next();
            if (c == '{') {
                if (statement.find(".section") != std::string::npos) break;  // from here on, all is for debuggers
                if (statement.find(".entry") == std::string::npos)
                    bad("only entries are understood, not " + trimmed(statement));
                entry(statement);
                statement.clear();
            } else if (c == ';') {
                module_variable(trimmed(statement));
                statement.clear();
            } else {
                statement += c;
            }
        }
        return std::move(kernels_);
    }

private:
    struct Register {
        uint32_t row;
        int bytes;
    };
    /// Dynamic shared memory follows static shared memory, whose size is known only at the end.
    static constexpr uint64_t DYNAMIC = 0xD1D1D1D1;

    const std::string& text_;
    const std::string source_;
    size_t at_ = 0;
    int line_ = 1;
    Kernels kernels_;
    std::map<std::string, Variable> module_shared_;
    std::set<std::string> dynamic_;
    // State of the current entry:
    Kernel* kernel_ = nullptr;
    uint32_t register_bytes_ = 0;
    std::vector<std::map<std::string, Register>> scopes_;
    std::map<std::string, int> labels_;
    std::map<int, std::string> jumps_;
    std::map<std::string, uint32_t> shared_, parameters_;
    std::map<std::pair<uint64_t, int>, uint32_t> constants_;

    [[noreturn]] void bad(const std::string& why) { fail("%s.ptx:%d: %s", source_.c_str(), line_, why.c_str()); }

    char next() {
        const char c = text_[at_++];
        line_ += c == '\n';
        return c;
    }

    void module_variable(const std::string& declaration) {
        if (!begins_with(declaration, ".extern .shared") && !begins_with(declaration, ".shared"))
            bad("not understood: " + declaration);
        const Variable variable(declaration);
        if (declaration[1] == 'e') dynamic_.insert(variable.name);
        else module_shared_.insert({variable.name, variable});
    }

    /// Allocates a row of 32 registers, or the word of a predicate.
    uint32_t new_row(int bytes) {
        const uint32_t row = (register_bytes_ + 31) / 32 * 32;
        register_bytes_ = row + (bytes == 1 ? 4 : LANES * bytes);
        return row;
    }

    const Register* find_register(const std::string& name) const {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            if (const auto found = scope->find(name); found != scope->end()) return &found->second;
        }
        return nullptr;
    }

    uint32_t constant(uint64_t value, int bytes) {
        const auto [found, is_new] = constants_.try_emplace({value, bytes}, 0);
        if (is_new) found->second = new_row(bytes);
        return found->second;
    }

    /// Places a shared variable of the module that this entry uses.
    bool is_shared(const std::string& name) {
        if (const auto found = module_shared_.find(name); found != module_shared_.end() && shared_.count(name) == 0) {
            shared_[name] = found->second.place(kernel_->static_shared);
        }
        return shared_.count(name) != 0;
    }

    /// The row of an operand of this many bytes.
    uint32_t row(const std::string& operand, int bytes) {
        if (operand == "_") return NOWHERE;
        static const char* const SPECIAL[SPECIAL_ROWS] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                                          "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                                          "%nctaid.y", "%nctaid.z", "%laneid"};
        for (uint32_t n = 0; n < SPECIAL_ROWS; ++n) {
            if (operand == SPECIAL[n]) return n * ROW;
        }
        if (const Register* found = find_register(operand)) {
            if (found->bytes != bytes) bad(operand + " is a register of another size");
            return found->row;
        }
        if (begins_with(operand, "0f") || begins_with(operand, "0d"))
            return constant(strtoull(operand.c_str() + 2, nullptr, 16), bytes);
        if (isdigit(operand[0]) || operand[0] == '-') {
            const uint64_t value = operand[0] == '-' ? uint64_t(strtoll(operand.c_str(), nullptr, 0))
                                                     : strtoull(operand.c_str(), nullptr, 0);
            return constant(bytes < 8 ? value & ((1ull << 8 * bytes) - 1) : value, bytes);
        }
        if (is_shared(operand)) return constant(shared_[operand], bytes);
        if (dynamic_.count(operand) != 0) return constant(DYNAMIC, bytes);
        if (parameters_.count(operand) != 0) return PARAMETERS_ROW;
        bad("what is " + operand + "?");
    }

    /// `[base+offset]`, to `a` and `offset`.
    void address(Instruction& i, const std::string& operand) {
        const std::string inner = operand.substr(1, operand.size() - 2);
        const size_t plus = inner.find('+');
        const std::string base = trimmed(inner.substr(0, plus));
        i.offset = plus == std::string::npos ? 0 : strtoll(inner.c_str() + plus + 1, nullptr, 0);
        if (const Register* found = find_register(base)) {
            i.a = found->row, i.address_bytes = uint8_t(found->bytes);
        } else if (parameters_.count(base) != 0) {
            i.a = PARAMETERS_ROW, i.address_bytes = 8, i.offset += parameters_[base];
        } else if (is_shared(base)) {
            i.offset += shared_[base];
        } else {
            bad("what is at " + operand + "?");
        }
    }

    void memory_access(Instruction& i, const std::vector<std::string>& parts,
                       const std::vector<std::string>& operands) {
        const bool loads = parts[0] == "ld";
        const auto is_in = [&](const char* space) {
            return std::find(parts.begin(), parts.end(), space) != parts.end();
        };
        if (is_in("global")) i.space = Space::kGlobal;
        else if (is_in("shared")) i.space = Space::kShared;
        else if (is_in("param")) i.space = Space::kParameter;
        else bad("an access to what?");
        i.bytes = uint8_t(bytes_of(parts.back()));
        i.is_signed = parts.back()[0] == 's';
        const std::vector<std::string> registers = vector_of(operands[loads ? 0 : 1]);
        i.elements = uint8_t(registers.size());
        // A register may be wider than the element in memory.
        i.register_bytes = std::max<uint8_t>(i.bytes, 2);
        for (const std::string& name : registers) {
            if (const Register* found = find_register(name)) i.register_bytes = uint8_t(found->bytes);
        }
        for (size_t n = 0; n < registers.size(); ++n) i.list[n] = row(registers[n], i.register_bytes);
        address(i, operands[loads ? 1 : 0]);
        i.execute = loads ? execute::load : execute::store;
    }

    void multiply(Instruction& i, const std::string& name, const std::vector<std::string>& operands) {
        i.kind = Kind::kTogether;
        uint32_t* to = i.list;
        for (int operand = 0; operand < 3; ++operand) {
            for (const std::string& each : vector_of(operands[operand])) *to++ = row(each, 4);
        }
        const std::vector<std::string> c = vector_of(operands[3]);
        i.a = row(c[0], 4), i.b = row(c[1], 4), i.c = row(c[2], 4), i.e = row(c[3], 4);
        if (name == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") i.execute = execute::mma_f16;
        else if (name == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") i.execute = execute::mma_bf16;
        else if (name == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32") i.execute = execute::mma_tf32;
        else bad("not understood: " + name);
    }

    void instruction(const std::string& statement) {
        Instruction i;
        i.text = statement;
        i.line = line_;
        std::string rest = statement;
        if (rest[0] == '@') {
            i.negated = rest[1] == '!';
            const size_t end = rest.find_first_of(" \t");
            const size_t begin = i.negated ? 2 : 1;
            i.guard = row(rest.substr(begin, end - begin), 1);
            rest = trimmed(rest.substr(end));
        }
        const size_t end = rest.find_first_of(" \t{");
        const std::string name = rest.substr(0, end);
        const std::vector<std::string> parts = split(name, '.');
        const std::vector<std::string> operands =
            end == std::string::npos ? std::vector<std::string>{} : split(rest.substr(end), ',');
        const auto has = [&](const char* part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); };
        const std::string& verb = parts[0];

        if (const Operation* operation = find_operation(name);
            operation != nullptr && operands[0][0] != '{' && operands[1][0] != '{') {
            if (operands.size() != operation->operands.size()) bad("operands of " + statement);
            uint32_t* const rows[] = {&i.d, &i.a, &i.b, &i.c, &i.e};
            for (size_t n = 0; n < operands.size(); ++n) *rows[n] = row(operands[n], operation->operands[n]);
            i.execute = operation->execute;
        } else if (verb == "mov") {  // of two registers as one, or one as two
            const bool packs = operands[1][0] == '{', wide = bytes_of(parts[1]) == 8;
            const std::vector<std::string> both = vector_of(operands[packs ? 1 : 0]);
            if (both.size() != 2) bad("not understood: " + statement);
            for (int n = 0; n < 2; ++n) i.list[n] = row(both[n], wide ? 4 : 2);
            (packs ? i.d : i.a) = row(operands[packs ? 0 : 1], wide ? 8 : 4);
            i.execute =
                packs ? (wide ? execute::pack64 : execute::pack32) : (wide ? execute::unpack64 : execute::unpack32);
        } else if (verb == "ld" || verb == "st") {
            memory_access(i, parts, operands);
        } else if (verb == "bra") {
            i.kind = Kind::kBranch;
            jumps_[int(kernel_->code.size())] = operands[0];
        } else if (verb == "ret") {
            i.kind = Kind::kReturn;
        } else if (statement == "bar.sync 0" || statement == "bar.sync \t0") {
            i.kind = Kind::kBarrier;
        } else if (verb == "griddepcontrol") {
            kernel_->waits = kernel_->waits || has("wait");
            i.execute = execute::nothing;
        } else if (verb == "membar" || verb == "fence") {
            i.execute = execute::fence;
        } else if (name == "atom.global.add.u32" || name == "atom.global.exch.b32" || name == "atom.global.or.b32" ||
                   name == "atom.shared.add.u32") {
            if (has("shared")) i.space = Space::kShared;
            i.d = row(operands[0], 4), i.b = row(operands[2], 4);
            address(i, operands[1]);
            i.execute = has("add") ? execute::atomic_add : has("exch") ? execute::atomic_exchange : execute::atomic_or;
        } else if (name == "cp.async.commit_group") {
            i.execute = execute::commit_group;
        } else if (name == "cp.async.wait_group") {
            i.offset = atoi(operands[0].c_str());
            i.execute = execute::wait_group;
        } else if (name == "cp.async.ca.shared.global" || name == "cp.async.cg.shared.global") {
            address(i, operands[0]);
            if (i.offset != 0) bad("not understood: " + statement);
            i.d = i.a;
            address(i, operands[1]);
            i.bytes = uint8_t(atoi(operands[2].c_str()));
            if (operands.size() > 3) i.c = row(operands[3], 4);
            i.execute = execute::copy_async;
        } else if (name == "shfl.sync.bfly.b32") {
            i.kind = Kind::kShuffle;
            const std::vector<std::string> results = split(operands[0], '|');
            i.list[0] = results.size() > 1 ? row(results[1], 1) : NOWHERE;
            i.d = row(results[0], 4), i.a = row(operands[1], 4), i.b = row(operands[2], 4), i.c = row(operands[3], 4),
            i.e = row(operands[4], 4);
            i.execute = execute::shuffle_xor;
        } else if (begins_with(name, "ldmatrix.sync.aligned.m8n8.x4.")) {
            i.kind = Kind::kTogether;
            const std::vector<std::string> registers = vector_of(operands[0]);
            i.elements = uint8_t(registers.size());
            for (size_t n = 0; n < registers.size(); ++n) i.list[n] = row(registers[n], 4);
            address(i, operands[1]);
            i.execute = has("trans") ? execute::load_matrices_transposed : execute::load_matrices;
        } else if (verb == "mma") {
            multiply(i, name, operands);
        }
        if (i.execute == nullptr && i.kind != Kind::kBranch && i.kind != Kind::kReturn && i.kind != Kind::kBarrier) {
            bad("not understood: " + statement);
        }
        kernel_->code.push_back(std::move(i));
    }

    /// `.reg .b32 %r<7>`: %r0 ... %r6, or names one by one.
    void registers(const std::string& declaration) {
        const size_t end = declaration.find_first_of(" \t");
        const int bytes = bytes_of(declaration.substr(1, end - 1));
        for (const std::string& name : split(declaration.substr(end), ',')) {
            const size_t many = name.find('<');
            if (many == std::string::npos) {
                scopes_.back()[name] = {new_row(bytes), bytes};
                continue;
            }
            for (int n = 0; n < atoi(name.c_str() + many + 1); ++n) {
                scopes_.back()[name.substr(0, many) + std::to_string(n)] = {new_row(bytes), bytes};
            }
        }
    }

    void statement(const std::string& text) {
        if (text.empty() || begins_with(text, ".pragma")) return;
        if (begins_with(text, ".reg")) {
            registers(trimmed(text.substr(4)));
        } else if (begins_with(text, ".shared")) {
            const Variable variable(text);
            shared_[variable.name] = variable.place(kernel_->static_shared);
        } else if (text[0] == '.') {
            bad("not understood: " + text);
        } else {
            instruction(text);
        }
    }

    /// Begins after the brace that opens the body.
    void entry(const std::string& header) {
        const auto kernel = std::make_shared<Kernel>();
        kernel_ = kernel.get();
        kernel_->source = source_;
        register_bytes_ = PARAMETERS_ROW + LANES * 8;
        scopes_.assign(1, {});
        labels_.clear(), jumps_.clear(), shared_.clear(), parameters_.clear(), constants_.clear();
        const size_t name = header.find(".entry") + 6, open = header.find('('), close = header.find(')');
        kernel_->name = trimmed(header.substr(name, open - name));
        for (const std::string& parameter : split(header.substr(open + 1, close - open - 1), ',')) {
            const Variable variable(parameter);
            parameters_[variable.name] = variable.place(kernel_->parameter_bytes);
        }
        if (parameters_.size() != 1) bad(kernel_->name + " has not one parameter");
        if (const size_t most = header.find(".maxntid"); most != std::string::npos) {
            kernel_->most_threads = atoi(header.c_str() + most + 8);
        }

        std::string text;
        while (!scopes_.empty()) {
            const char c = next();
            const bool at_start = trimmed(text).empty();
            if (c == '{' && at_start) {
                scopes_.emplace_back();
            } else if (c == '}' && at_start) {
                scopes_.pop_back();
            } else if (c == ';') {
                statement(trimmed(text));
                text.clear();
            } else if (c == ':' && trimmed(text).find_first_of(" \t{[") == std::string::npos) {
                labels_[trimmed(text)] = int(kernel_->code.size());
                text.clear();
            } else {
                text += c;
            }
        }
        // A branch may go past the last instruction.
        Instruction end;
        end.kind = Kind::kReturn;
        kernel_->code.push_back(end);
        for (const auto& [from, label] : jumps_) {
            if (labels_.count(label) == 0) bad("no label " + label);
            kernel_->code[from].target = labels_[label];
        }
        kernel_->static_shared = (kernel_->static_shared + 127) / 128 * 128;
        fill_constants();
        kernels_[kernel_->name] = kernel;
    }

    /// Registers that are not constant begin with arbitrary content.
    void fill_constants() {
        kernel_->registers.assign(register_bytes_, 0xEE);
        for (const auto& [key, row] : constants_) {
            const auto [value, bytes] = key;
            const uint64_t bits = value == DYNAMIC ? kernel_->static_shared : value;
            uint8_t* const to = &kernel_->registers[row];
            if (bytes == 1) {
                const uint32_t word = bits != 0 ? ~0u : 0;
                memcpy(to, &word, 4);
                continue;
            }
            for (int lane = 0; lane < LANES; ++lane) memcpy(to + lane * bytes, &bits, bytes);
        }
    }
};

/// Removes lines for debuggers; the others keep their numbers.
std::string code_of(const std::string& ptx) {
    std::string code;
    bool begun = false;
    for (size_t at = 0; at < ptx.size();) {
        const size_t end = std::min(ptx.find('\n', at), ptx.size());
        std::string line = ptx.substr(at, end - at);
        at = end + 1;
        line.resize(std::min(line.find("//"), line.size()));
        const std::string text = trimmed(line);
        begun = begun || begins_with(text, ".version");
        bool drop = !begun;
        for (const char* directive : {".loc", ".file", ".version", ".target", ".address_size"})
            drop = drop || begins_with(text, directive);
        code += drop ? "\n" : line + "\n";
    }
    return code;
}

}  // namespace

Kernels parse(const std::string& ptx, const std::string& source) { return Parser(code_of(ptx), source).run(); }
