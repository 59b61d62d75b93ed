# A bare-metal guest: real mode, then 64 bits, then user mode (CPL 3), where KVM runs it natively.
#
# It writes to each page of its working set once, then reads one word of each, again and again. When the test asks for writes it makes them among
# those reads: a page and its mirror in the other half of the working set get the same number at the same place, after
# the two were compared. Which pages: random ones, or the first ones of the working set, the same in every round.
#
#   control page of processor N, at CONTROL + N pages, in 64-bit words:
#     0 passes over the working set    1 pairs that differed    2 pairs still to be written    3 pairs written
#     4 not 0: the pairs are the first pages, one after the other
#
# Symbols: PAGES, the working set's number of pages, a power of 2; PROCESSORS, 1 or 2, each with a working set of its own.
  .set BASE, 0x1000000
  .set CONTROL, 0x200000
  .set STACK, 0x3000
  .set TABLES, 0x4000
  .set ENTRY, 0x8000
  .set APIC_TABLE, 0x9000
  .set USER, 0x100000
  .set LAPIC_ICR, 0xfee00300

  .code16
  .text
  .globl _start
_start:
  cli
  cld
  xorw %ax, %ax
  movw %ax, %ds
  movw %ax, %es
  # Page tables, in memory that is zero: 2 GiB in pages of 2 MiB for user mode, and the local APIC.
  movl $(TABLES + 0x1000 + 0x27), TABLES
  movl $(TABLES + 0x2000 + 0x27), TABLES + 0x1000
  movl $(TABLES + 0x3000 + 0x27), TABLES + 0x1008
  movl $(APIC_TABLE + 0x27), TABLES + 0x1018
  movl $0xfee00093, APIC_TABLE + 503 * 8
  movw $(TABLES + 0x2000), %di
  movl $0xe7, %eax
  movw $1024, %cx
1:
  movl %eax, (%di)
  addl $0x200000, %eax
  addw $8, %di
  decw %cx
  jnz 1b
  # No interrupts.
  movb $0xff, %al
  outb %al, $0x21
  outb %al, $0xa1
  # A far jump to where the second processor begins.
  movb $0xea, ENTRY
  movw $second, ENTRY + 1
  movw $0xf000, ENTRY + 3
  xorl %ebp, %ebp
  jmp enter
second:
  cli
  movl $1, %ebp
enter:
  lgdtl %cs:table_of_segments
  movl $0x20, %eax
  movl %eax, %cr4
  movl $TABLES, %eax
  movl %eax, %cr3
  movl $0xc0000080, %ecx
  movl $0x501, %eax
  xorl %edx, %edx
  wrmsr
  movl $0x80050033, %eax
  movl %eax, %cr0
  ljmpl $0x10, $(0xf0000 + long_mode)

  .code64
long_mode:
  movl $0x18, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %ss
  # Two stacks, of which each processor leaves its own at once.
  movl %ebp, %eax
  shll $8, %eax
  movl $STACK, %esp
  subl %eax, %esp
  testl %ebp, %ebp
  jnz 3f
  leaq user(%rip), %rsi
  movl $USER, %edi
  movl $(user_end - user), %ecx
  rep movsb
  .if PROCESSORS - 1
  # INIT, then a start-up message for page 8 (ENTRY), to all but this processor.
  movl $LAPIC_ICR, %ebx
  movl $0xc4500, (%rbx)
  movl $50000, %ecx
2:
  decl %ecx
  jnz 2b
  movl $0xc4608, (%rbx)
  .endif
3:
  pushq $0x2b
  pushq %rsp
  pushq $2
  pushq $0x33
  pushq $USER
  iretq

user:
  movl $0x2b, %eax
  movl %eax, %ds
  movl %eax, %es
  # %rdi: this processor's working set; %rdx: its control page; %r9: its random numbers.
  movl %ebp, %eax
  imulq $(PAGES << 12), %rax, %rdi
  addq $BASE, %rdi
  shll $12, %eax
  leaq CONTROL(%rax), %rdx
  leaq 4711(%rbp), %r9
  movabsq $6364136223846793005, %r14
  movabsq $1442695040888963407, %r15
  # Every page exists, and is not zero: its first word is its number in its half.
  movq %rdi, %rbx
  xorl %ecx, %ecx
9:
  movl %ecx, %eax
  andl $(PAGES / 2 - 1), %eax
  incl %eax
  movq %rax, (%rbx)
  addq $4096, %rbx
  incl %ecx
  cmpl $PAGES, %ecx
  jne 9b
pass:
  movq %rdi, %rbx
  movl $PAGES, %ecx
4:
  movq (%rbx), %rax
  addq $4096, %rbx
  testb $63, %cl
  jnz 7f
  movq 16(%rdx), %r11
  testq %r11, %r11
  jz 7f
5:
  imulq %r14, %r9
  addq %r15, %r9
  movq %r9, %rax
  shrq $33, %rax
  cmpq $0, 32(%rdx)
  je 6f
  movq %r11, %rax
6:
  andl $(PAGES / 2 - 1), %eax
  shlq $12, %rax
  addq %rdi, %rax
  movq %r9, %r8
  shrq $20, %r8
  andl $0xff8, %r8d
  addq %r8, %rax
  movq (%rax), %r10
  cmpq PAGES / 2 * 4096(%rax), %r10
  je 8f
  incq 8(%rdx)
8:
  movq %r9, (%rax)
  movq %r9, PAGES / 2 * 4096(%rax)
  incq 24(%rdx)
  decq %r11
  jnz 5b
  movq $0, 16(%rdx)
7:
  decl %ecx
  jnz 4b
  incq (%rdx)
  jmp pass
user_end:

  .balign 8
segments:
  .quad 0
  .quad 0x00cf93000000ffff
  .quad 0x00af9b000000ffff
  .quad 0x00cf93000000ffff
  .quad 0x00cffb000000ffff
  .quad 0x00cff3000000ffff
  .quad 0x00affb000000ffff
table_of_segments:
  .word . - segments - 1
  .long 0xf0000 + segments
  .org 0xfff0
  .code16
  ljmp $0xf000, $_start
  .org 0xffff
  .byte 0
